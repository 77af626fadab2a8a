"""A run does not go on from, nor give out, a checkpoint or data that are not what was written."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.data.preparing import prepare_file
from rlhfjax.integrity import MANIFEST
from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STEPS, write_jsonl


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def arrays_of(item):
    """The largest file of an item, which holds arrays."""
    return max((path for path in item.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def unfinished(run_dir, stage):
    (run_dir / stage / "complete.json").unlink()
    return run_dir / stage / "checkpoints"


@pytest.fixture
def whole_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def invoke(*words, code):
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="rlhfjax")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_a_stage_goes_on_from_the_newest_step_that_is_whole(whole_copy, finished, config, command):
    # fails when the damaged step is read without being compared: seen
    checkpoints = unfinished(whole_copy, "ppo")
    bad = arrays_of(checkpoints / str(STEPS) / "training")
    flip(bad)
    code, _, err = command("run", config, "--run-dir", whole_copy, "--only", "ppo")
    assert code == 0, err
    assert f"{bad.relative_to(checkpoints / str(STEPS))}: expected digest SHA-256" in err
    assert f"set aside as {STEPS}.damaged; going on from step {STEPS - 1}" in err
    assert_same_bits(saved(checkpoints / str(STEPS)), saved(finished / "ppo" / "checkpoints" / str(STEPS)))
    assert [row["step"] for row in rows_of(whole_copy / "ppo" / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_on_damage_stop_ends_with_4(whole_copy, config):
    checkpoints = unfinished(whole_copy, "sft")
    flip(arrays_of(checkpoints / str(STEPS) / "policy"))
    words = ("run", config, "checkpoints.on_damage=stop", "--run-dir", whole_copy, "--only", "sft")
    message = invoke(*words, code=4).stderr
    assert "expected digest SHA-256" in message
    assert "run again with --from sft" in message
    assert (checkpoints / str(STEPS)).is_dir()
    line = rows_of(whole_copy / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("failed", 4)


def test_a_model_that_a_later_stage_needs(whole_copy, config):
    unfinished(whole_copy, "ppo")
    shutil.rmtree(whole_copy / "ppo")
    step = json.loads((whole_copy / "reward" / "complete.json").read_text())["step"]
    arrays_of(whole_copy / "reward" / "checkpoints" / str(step) / "average").unlink()
    message = invoke("run", config, "--run-dir", whole_copy, "--only", "ppo", code=4).stderr
    assert f"reward/checkpoints/{step}: average/" in message
    assert "is missing" in message
    assert "run again with --from reward" in message


def test_a_model_that_is_asked_for(whole_copy, tmp_path):
    step = whole_copy / "ppo" / "checkpoints" / str(STEPS)
    flip(arrays_of(step / "value"))  # another model, which nobody reads here
    said = ("generate", whole_copy, "--prompt", "the", "--max-new-tokens", 2)
    assert invoke(*said, code=0).stdout
    for bad in (arrays_of(step / "average"), step / "average" / "commit_success.txt"):  # which reading does not need
        flip(bad)
        for words in (said, ("export", whole_copy, tmp_path / "exported")):
            assert f"{bad.relative_to(step)}: expected digest" in invoke(*words, code=4).stderr
            assert not (tmp_path / "exported").exists()
        flip(bad)
    flip(step / "average" / "commit_success.txt")
    assert invoke(*said, "--no-verify", code=0).stdout


def test_verify_says_what_it_read_and_names_every_file_that_differs(whole_copy):
    result = invoke("verify", whole_copy, code=0)
    lines = [line for line in result.stdout.splitlines() if "ledger.jsonl: " not in line]
    assert len(lines) == len(list(whole_copy.glob("*/checkpoints/*")))
    assert all(line.endswith("bytes, all as written") for line in lines)
    step = whole_copy / "ppo" / "checkpoints" / str(STEPS)
    without = whole_copy / "sft" / "checkpoints" / str(STEPS)
    bad = [step / "meta" / "metadata", arrays_of(step / "value"), without / MANIFEST]
    flip(bad[0])
    for path in bad[1:]:
        path.unlink()
    result = invoke("verify", whole_copy, code=4)
    told = sorted(line for line in result.stdout.splitlines() if "as written" not in line and "ledger" not in line)
    expected = sorted([f"{bad[0]}: expected digest", f"{bad[1]}: is missing", f"{bad[2].parent}: expected {MANIFEST}"])
    assert [line[: len(beginning)] for line, beginning in zip(told, expected, strict=True)] == expected
    assert "error: 3 files are not what was written" in result.stderr
    assert invoke("verify", whole_copy / "reward", code=0).stdout
    assert "expected a checkpoint, stage, run, export" in invoke("verify", whole_copy / "tokenizer", code=2).stderr


def test_exports_have_a_manifest_too(finished, tmp_path):
    invoke("export", finished, tmp_path / "exported", code=0)
    assert "all as written" in invoke("verify", tmp_path / "exported", code=0).stdout
    flip(tmp_path / "exported" / "model.safetensors")
    assert "model.safetensors: expected digest" in invoke("verify", tmp_path / "exported", code=4).stdout


def test_data_that_changed_since_a_stage_began_are_refused(whole_copy, config, files, tmp_path):
    # fails when they are not compared: seen
    unfinished(whole_copy, "sft")
    own = Path(shutil.copytree(files, tmp_path / "files", ignore=shutil.ignore_patterns("prepared")))
    (own / "prepared").symlink_to(files / "prepared")
    for path in (own / config.name, *whole_copy.glob("*.*"), *whole_copy.glob("*/complete.json")):  # as if made there
        path.write_text(path.read_text(encoding="utf-8").replace(str(files), str(own)), encoding="utf-8")
    path = own / "demonstrations.jsonl"
    write_jsonl(path, rows_of(path)[:-1])
    for _ in range(2):  # the attempt that was refused must not be what the next is compared with
        message = invoke("run", own / config.name, "--run-dir", whole_copy, "--only", "sft", code=3).stderr
        assert f"{path}@train has changed since this stage began: expected fingerprint" in message
        assert "--from sft" in message


def test_a_shard_that_is_missing_is_refused(whole_copy, files, tmp_path):
    unfinished(whole_copy, "sft")
    prepared = tmp_path / "prepared"
    shard = next(prepare_file(files / "demonstrations.jsonl", "demonstration", prepared).glob("*array_record*"))
    recipe = json.loads((files / "tiny.yaml").read_text(encoding="utf-8"))
    recipe["data_dir"] = str(prepared)
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps(recipe), encoding="utf-8")
    run_dir = tmp_path / "another"
    name = shard.relative_to(prepared).parts[0]
    assert "all as written" in invoke("verify", name, "--data-dir", prepared, code=0).stdout
    flip(shard)
    assert f"{shard.name}: expected digest" in invoke("verify", name, "--data-dir", prepared, code=4).stdout
    shard.unlink()
    message = invoke("run", own, "--run-dir", run_dir, code=4).stderr
    assert f"{shard.name}: is missing; delete the folder and prepare it again" in message


def test_what_would_fail_at_the_first_save_fails_at_the_start(whole_copy, config, tmp_path):
    checkpoints = unfinished(whole_copy, "ppo")
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to(tmp_path / "unmounted")
    words = ("run", config, "--run-dir", whole_copy, "--only", "ppo")
    result = invoke(*words, code=2)
    assert "ppo/checkpoints: expected a directory to save checkpoints in, got " in result.stderr
    assert "ppo: started" not in result.stderr
    message = invoke(*words, "checkpoints.keep_best=-loss/validatoin", code=2).stderr
    assert "checkpoints.keep_best: expected a metric, or -METRIC for the lowest, got '-loss/validatoin'" in message
    assert "did you mean loss/validation" in message
