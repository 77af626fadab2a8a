"""A run writes and deletes only what a run made: everything else that bears such a name is refused and left alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
from stages.tiny_recipe import STAGES
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.config import load_config, resolved_yaml
from rlhfjax.errors import ConfigError, IntegrityError, Stopped
from rlhfjax.runs import recipe
from rlhfjax.runs.directory import require_own, settle


@pytest.fixture
def run_dir(tmp_path, config):
    """A run whose SFT stage was killed before its first checkpoint, as it looks from outside."""
    folder = tmp_path / "run"
    for stage in ("tokenizer", "pretrain", "sft"):
        (folder / stage).mkdir(parents=True)
    (folder / "tokenizer" / "complete.json").write_text("{}")
    (folder / "pretrain" / "checkpoints" / "4").mkdir(parents=True)
    (folder / "sft" / "metrics.jsonl").touch()
    (folder / "config.yaml").write_text(resolved_yaml(load_config(config)), encoding="utf-8")
    (folder / "manifest.jsonl").write_text(json.dumps({"stages": ["tokenizer", "pretrain", "sft"]}) + "\n")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(config, folder, *options):
    """The message of a run that must end with exit code 2 and without a traceback, whatever `folder` holds."""
    result = CliRunner().invoke(app, ["run", str(config), "--run-dir", str(folder), *options], prog_name="rlhfjax")
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
    return result.stderr


@pytest.mark.parametrize("options", [(), ("--from", "sft"), ("--only", "tokenizer")])
@pytest.mark.parametrize("name", ["sft/train.py", "base/checkpoints/0", "manifest.jsonl", "report.html"])
def test_a_directory_without_a_runs_configuration_is_somebody_elses(config, tmp_path, name, options):
    # fails where --from deletes by name: seen (`sft/train.py` of the current directory was gone)
    path = tmp_path / "foreign" / name
    path.parent.mkdir(parents=True)
    path.write_text("of great value")
    before = contents(tmp_path)
    message = refused(config, tmp_path / "foreign", *options)
    assert f"without a run's config.yaml that holds {name.split('/')[0]}; nothing was touched" in message
    assert contents(tmp_path) == before
    assert not (tmp_path / "foreign" / ".lock").exists()


@pytest.mark.parametrize("options", [(), ("--from", "tokenizer"), ("--from", "reward")])
@pytest.mark.parametrize("name", ["reward/model.py", "ppo", "base/notes"])
def test_a_folder_that_no_stage_made_in_a_run_is_somebody_elses(config, run_dir, name, options):
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text("of great value")
    before = contents(run_dir)
    assert f"{run_dir / name.split('/')[0]}: expected the folder of a stage" in refused(config, run_dir, *options)
    assert contents(run_dir) == before


def test_a_configuration_that_no_run_wrote_is_not_replaced(config, run_dir):
    own = run_dir / "config.yaml"
    for name in ("manifest.jsonl", "tokenizer", "pretrain", "sft"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    require_own(run_dir)  # of a run that was killed right at its beginning
    for text in (Path(config).read_text(encoding="utf-8"), "layers: 3\n"):
        own.write_text(text, encoding="utf-8")
        assert f"{own}: no run wrote this" in refused(config, run_dir)
        assert own.read_text(encoding="utf-8") == text


def test_what_a_run_made_is_its_own(run_dir, tmp_path):
    require_own(run_dir)
    (run_dir / "ppo").mkdir()  # somebody's, but empty
    (run_dir / "notes.txt").touch()
    require_own(run_dir)
    (run_dir / "manifest.jsonl").unlink()  # as runs of 0.1 were
    (run_dir / "sft" / "metrics.jsonl").unlink()
    require_own(run_dir)
    (tmp_path / "copied" / "tokenizer").mkdir(parents=True)
    (tmp_path / "copied" / "tokenizer" / "complete.json").write_text('{"stage": "tokenizer"}')
    require_own(tmp_path / "copied")
    (tmp_path / "copied" / "sft").mkdir()
    (tmp_path / "copied" / "sft" / "complete.json").write_text('{"stage": "lighting"}')
    with pytest.raises(ConfigError, match="expected a new directory or that of a run"):
        require_own(tmp_path / "copied")
    (tmp_path / "empty").mkdir()
    require_own(tmp_path / "empty")
    require_own(tmp_path / "new")


def test_a_manifest_that_cannot_be_read(run_dir):
    for text in ("{", "[1]\n", '{"stages": 3}\n'):
        (run_dir / "manifest.jsonl").write_text(text)
        with pytest.raises(IntegrityError, match=r"manifest\.jsonl: expected the attempts of a run"):
            require_own(run_dir)


def test_what_is_done_again_goes_whole(config, run_dir, tmp_path):
    (tmp_path / "disk" / "checkpoints").mkdir(parents=True)
    (run_dir / "reward").symlink_to(tmp_path / "disk")
    settle(load_config(config), run_dir, "pretrain", STAGES)
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "manifest.jsonl", "reward", "tokenizer"]
    assert list((tmp_path / "disk").iterdir()) == []  # fails where a link is not deleted, and its stage counts as done


def test_what_cannot_be_deleted_is_said_and_nothing_before_it_is_gone(config, run_dir, monkeypatch):
    # fails where errors of the deletion are ignored: the stage would stay, and count as done
    (run_dir / "sft" / "complete.json").write_text("{}")

    def fail(path, **_):
        raise OSError(16, os.strerror(16), str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(ConfigError, match=r"sft: cannot be deleted: Device or resource busy"):
        settle(load_config(config, ["stages.pretrain.steps=9"]), run_dir, "pretrain", STAGES)
    assert not (run_dir / "sft" / "complete.json").exists()
    assert (run_dir / "pretrain" / "checkpoints").exists()
    assert load_config(run_dir / "config.yaml") == load_config(config)


def test_no_directory_is_not_the_current_one(config, tmp_path, monkeypatch):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "'--run-dir': expected a directory, got nothing" in refused(config, "", "--from", "sft")
    for words in (["data", "inspect", str(config), "ppo"], ["reproduce", "sft"]):
        result = CliRunner().invoke(app, [*words, "--run-dir", ""], prog_name="rlhfjax")
        assert (result.exit_code, "got nothing" in result.stderr) == (2, True)
    assert (tmp_path / "sft" / "train.py").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "expected the directory of a run, got a file; give another --run-dir"),
        ("file/run", "cannot be written: Not a directory"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_a_run_directory_that_cannot_be_is_no_bug(config, tmp_path, name, said):
    # meant to catch FileExistsError and its relatives as tracebacks
    (tmp_path / "file").touch()
    assert said in refused(config, tmp_path / name)


def test_a_stage_that_cannot_be_marked_stops_and_can_go_on(tmp_path):
    # meant to catch OSError as a traceback, for which other processes would wait for ever
    with pytest.raises(Stopped, match=r"complete\.json\.part: cannot be written: No such file .* same command again"):
        recipe._mark(tmp_path / "gone", {"step": 4})
