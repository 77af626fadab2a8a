"""`rlhfjax reproduce`: equal to the last bit, refused by name where something changed, and the step that differs."""

import copy
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
from stages.conftest import rows_of
from stages.tiny_recipe import STAGES, STEPS, write_files, write_recipe
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.config import load_config
from rlhfjax.data.preparing import prepare_file
from rlhfjax.errors import ConfigError, Diverged, IntegrityError, Stopped
from rlhfjax.host import environment
from rlhfjax.integrity import MANIFEST
from rlhfjax.runs.comparison import first_differences
from rlhfjax.runs.conditions import other_conditions
from rlhfjax.runs.kept_rows import path_of
from rlhfjax.runs.layouts import layout_of
from rlhfjax.runs.manifest import describe, ended_as, read_attempts
from rlhfjax.runs.reproduce import conditions, reproduce
from rlhfjax.target import Target, target_of

SHORT = [f"stages.{stage}=null" for stage in ("sft", "reward", "ppo", "evaluate")]


# What a run notes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def line(finished):
    return read_attempts(finished)[-1]


def test_the_manifest_says_what_is_needed_to_run_it_again(finished, line, config):
    assert len(line["code"]["sha256"]) == 64
    assert "runs/manifest.py" in line["code"]["files"]
    assert {"jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore", "ml-dtypes"} <= line["packages"].keys()
    assert "pytest" not in line["packages"]  # only what the run depends on
    assert line["packages"]["jax"] == jax.__version__
    assert line["mesh"] == {
        "shape": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, "expert": 1},
        "device_order": [0],
    }
    assert (line["backend"], line["process"], line["determinism"]) == ("cpu", [0, 1], "fast")
    assert line["settings"]["jax_threefry_partitionable"] is True
    assert line["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert line["target"] == target_of(jax.devices()[:1]).facts()
    assert set(line["config_sources"]) >= {"name", "stages.ppo.kl.target"}
    assert line["config_sources"]["name"].startswith(f"{config}:")
    assert {len(line[name]) for name in ("tokenizer", "chat_template")} == {64}
    assert line["stages"] == list(STAGES)
    assert oct((finished / "manifest.jsonl").stat().st_mode & 0o777) == "0o600"


def test_the_lineage_names_the_models_that_stages_start_from(finished, line):
    steps = {
        stage: {name: found["step"] for name, found in line["lineage"][stage].items()} for stage in line["lineage"]
    }
    chosen = json.loads((finished / "sft" / "complete.json").read_text(encoding="utf-8"))["step"]
    assert steps == {
        "sft": {"pretrain": STEPS},
        "reward": {"sft": chosen},
        "ppo": {"sft": chosen, "reward": STEPS},
        "evaluate": {"pretrain": STEPS, "sft": chosen, "reward": STEPS, "ppo": STEPS},
    }
    digests = {found["digest"] for parents in line["lineage"].values() for found in parents.values()}
    assert len(digests) == 4  # one model, one digest, whoever starts from it


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ("finished", 0)),
        (KeyboardInterrupt(), ("interrupted", 130)),
        (ConfigError("x"), ("failed", 2)),
        (IntegrityError("x"), ("failed", 4)),
        (Diverged("x"), ("diverged", 4)),
        (Stopped("x"), ("preempted", 42)),
        (ZeroDivisionError("x"), ("failed", 1)),
        (SystemExit(3), ("failed", 3)),
    ],
)
def test_how_an_attempt_ended(error, expected):
    assert ended_as(error) == expected


def test_requirements_are_followed_with_their_extras():
    needed = environment._needed
    assert needed('jax[cuda13, k8s] >=0.10 ; extra == "cuda"', frozenset({"cuda"})) == (
        "jax",
        frozenset({"cuda13", "k8s"}),
    )
    assert needed("pytest>=9 ; extra == 'test'", frozenset({"cuda"})) is None
    assert needed('numpy>=2; python_version >= "3.11"', frozenset()) == ("numpy", frozenset())


# What must be as it was ----------------------------------------------------------------------------------------------

NOW = {
    "code": {"sha256": "a", "files": {"api.py": "1", "types.py": "2"}},
    "packages": {"jax": "0.10.2", "numpy": "2.4.6"},
    "python": "3.11.7",
    "flags": {"XLA_FLAGS": "--xla_a"},
    "settings": {"jax_enable_x64": False},
    "devices": ["cpu", "cpu"],
    "process": [0, 1],
    "mesh": {"shape": {"data": 2, "fsdp": 1}, "device_order": [0, 1]},
    "machine": {"architecture": "x86_64", "processor": "one", "cores": 2, "nvidia_driver": "580.1"},
    "backend": "cpu",
    "platform_version": "cpu",
    "data": {"a.jsonl@train": "0" * 64},
    "started_from": {"model.checkpoint": "1" * 64},
    "chat": {"date": "2026-01-31", "sft": {"enable_thinking": False}},
    "target": {"platform": "cpu", "slots": 32, "blocks": 2},
    "rewards": {"grpo": {"letters": {"kind": "function", "sha256": {"mine.py": "3" * 64}}}},
}


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("packages", "jax"), "0.10.1", "package jax: expected 0.10.1, got 0.10.2"),
        (("packages", "new"), "1", "package new: expected 1, got nothing"),
        (("python",), "3.12.1", "Python: expected 3.12, got 3.11"),
        (("flags", "XLA_FLAGS"), "--xla_b", "flag XLA_FLAGS: expected --xla_b, got --xla_a"),
        (("settings", "jax_enable_x64"), True, "setting jax_enable_x64: expected True, got False"),
        (("devices",), ["cpu"], "devices: expected 1 x cpu, got 2 x cpu"),
        (("devices",), ["TPU v5p"] * 2, "devices: expected 2 x TPU v5p, got 2 x cpu"),
        (("process",), [0, 2], "processes: expected 2, got 1"),
        (("mesh", "shape"), {"data": 1, "fsdp": 2}, "mesh: expected data 1 x fsdp 2, got data 2 x fsdp 1"),
        (("mesh", "device_order"), [1, 0], "order of devices in the mesh: expected [1, 0], got [0, 1]"),
        (("machine", "processor"), "other", "processor: expected other, got one"),
        (("machine", "cores"), 8, "cores: expected 8, got 2"),
        (("target", "platform"), "tpu", "target platform: expected tpu, got cpu"),
        (("target", "blocks"), 8, "target blocks: expected 8, got 2; reliability.sizes.blocks sets it"),
        (("chat", "date"), "2031-01-02", "chat settings of date: expected 2031-01-02, got 2026-01-31"),
        (("chat", "sft"), {}, "chat settings of sft: expected {}, got {'enable_thinking': False}"),
        (("data", "a.jsonl@train"), "2" * 64, "data a.jsonl@train: expected SHA-256 222222222222…, got 000000000000…"),
        (
            ("started_from", "model.checkpoint"), "2" * 64,
            "model.checkpoint: expected SHA-256 222222222222…, got 111111111111…",
        ),
        (
            ("rewards", "grpo", "letters", "sha256", "mine.py"), "4" * 64,
            "rewards of grpo: mine.py: expected SHA-256 444444444444…, got 333333333333…",
        ),
        (("code",), {"sha256": "b", "files": {"api.py": "0", "old.py": "1", "types.py": "2"}},
         "code of rlhfjax: api.py, old.py changed"),
    ],
)  # fmt: skip
def test_one_thing_that_changed_is_one_line(place, value, expected):
    then = copy.deepcopy(NOW)
    assert other_conditions(then, NOW) == []
    at = then
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    assert other_conditions(then, NOW) == [expected]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"devices": ["cpu"] * 4, "process": [0, 2], "backend": "cpu"}], "2 processes with 2 x cpu each"),
        ([{"devices": ["cpu"] * 8, "process": [0, 1], "backend": "cpu"}], "1 process with 8 x cpu"),
        ([{"devices": ["cpu"] * 3, "process": [0, 2], "backend": "cpu"}], "None"),
        ([{"devices": ["cpu"], "process": [0, 1], "stages": ["sft"]},
          {"devices": ["cpu"] * 2, "process": [0, 2], "stages": []}], "1 process with 1 x cpu"),
    ],
)  # fmt: skip
def test_the_layout_is_that_of_the_last_attempt_that_trained(lines, expected):
    assert str(layout_of(lines)) == expected


def test_what_changes_no_number_is_not_held_against_it():
    then = copy.deepcopy(NOW) | {"python": "3.11.2"}
    then["machine"]["nvidia_driver"] = "other"  # this is a run on a CPU
    del then["target"]["slots"]  # an older version, which knew of no such size
    assert other_conditions(then, NOW) == []


def test_a_gpu_is_compared_by_its_driver():
    now = NOW | {"backend": "gpu", "platform_version": "cuda 13000"}
    then = now | {"machine": NOW["machine"] | {"nvidia_driver": "570.0", "processor": "other"}, "platform_version": "x"}
    assert other_conditions(then, now) == [
        "platform: expected x, got cuda 13000",
        "NVIDIA driver: expected 570.0, got 580.1",
    ]


# Runs that are compared ----------------------------------------------------------------------------------------------


@pytest.fixture
def other(finished, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "other")
    return tmp_path / "other"


def edit(path, step, change):
    rows = rows_of(path)
    change(next(row for row in rows if row["step"] == step))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_equal_runs_have_no_difference(finished, other):
    for stage in ("sft", "ppo"):  # times may differ
        edit(other / stage / "metrics.jsonl", 2, lambda row: row.update({"timing/step_s": 9.0, "perf/mfu": 0.5}))
    assert first_differences(finished, other, list(STAGES)) == []


def test_the_first_step_that_differs_is_named(finished, other):
    path = other / "ppo" / "metrics.jsonl"
    before = rows_of(path)[2]["objective/kl"]
    after = before * (1 + 2**-50)  # one bit, or two
    assert after != before
    for step in (3, 4):
        edit(path, step, lambda row: row.update({"objective/kl": after}))
    assert first_differences(finished, other, list(STAGES)) == [
        f"ppo step 3: objective/kl expected {before!r}, got {after!r}"
    ]


def test_what_was_read_comes_before_what_came_of_it(finished, other):
    """With other prompts everything is another: that is the cause."""
    edit(other / "ppo" / "ledger.jsonl", 2, lambda line: line["rows"].reverse())
    edit(other / "ppo" / "metrics.jsonl", 2, lambda row: row.update({"objective/kl": 9.0}))
    assert first_differences(finished, other, list(STAGES)) == ["ppo ledger step 2: rows"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: edit(run / "sft/metrics.jsonl", 1, lambda row: row.pop("lr")), "sft step 1: lr expected 0.0"),
        (lambda run: (run / "sft/metrics.jsonl").write_text(""), "sft step: expected 1, got nothing"),
        (lambda run: edit(run / "ppo/samples.jsonl", 2, lambda row: row.update(score=9.0)), "ppo sample step 2: score"),
        (lambda run: shutil.rmtree(run / f"sft/checkpoints/{STEPS}"), f"sft checkpoints: expected {STEPS} as the last"),
        (lambda run: (run / "tokenizer/tokenizer.model.sha256").write_text("0"), "tokenizer tokenizer.model.sha256:"),
    ],
)
def test_other_differences(finished, other, change, expected):
    change(other)
    [found] = first_differences(finished, other, list(STAGES))
    assert found.startswith(expected)


def test_other_arrays_are_named(finished, other):
    place = other / "reward" / "checkpoints" / str(STEPS)
    shutil.rmtree(place)
    shutil.copytree(other / "reward" / "checkpoints" / str(STEPS - 1), place)
    [found] = first_differences(finished, other, list(STAGES))
    assert found.startswith(f"reward checkpoint {STEPS}: average/")


# Whether it can be done here -----------------------------------------------------------------------------------------


@pytest.fixture
def short(files, command, tmp_path):
    """A finished run of tokenizer and pretraining on files of its own: (its directory, the files)."""
    own = write_files(tmp_path / "files") if (tmp_path / "files").mkdir() is None else None
    code, _, err = command("run", write_recipe(own / "own.yaml", own), *SHORT, "--run-dir", tmp_path / "run")
    assert code == 0, err
    return tmp_path / "run", own


def test_two_processes_give_the_same_bits_and_a_byte_is_noticed(short, environment, tmp_path):
    """Equal; then refused, by name, for the version of a package and for a byte of a file."""
    run_dir, own = short
    words = [sys.executable, "-m", "rlhfjax.cli", "reproduce", str(run_dir)]  # which hashes texts in its own way
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokenizer, pretrain are equal to those of" in done.stderr
    again = tmp_path / "run-reproduced"
    assert [row["loss/train"] for row in rows_of(again / "pretrain" / "metrics.jsonl")] == [
        row["loss/train"] for row in rows_of(run_dir / "pretrain" / "metrics.jsonl")
    ]
    result = CliRunner().invoke(app, ["reproduce", str(run_dir)], prog_name="rlhfjax")  # it is there already
    assert (result.exit_code, "expected a new directory" in result.stderr) == (2, True)

    optax = tmp_path / "site" / "optax-9.9.9.dist-info"
    optax.mkdir(parents=True)
    (optax / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9.9\n", encoding="utf-8")
    text = (own / "documents.jsonl").read_text(encoding="utf-8")
    (own / "documents.jsonl").write_text(text.replace("film", "folm", 1), encoding="utf-8")
    path = f"{tmp_path / 'site'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    words, variables = [*words, "--only-check"], environment | {"PYTHONPATH": path}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    first, *lines = done.stderr.splitlines()
    assert done.returncode == 4, done.stderr
    assert first == f"error: {run_dir} cannot be reproduced here: 2 differences"
    packages = read_attempts(run_dir)[-1]["packages"]
    assert lines[0] == f"  package optax: expected {packages['optax']}, got 9.9.9"
    assert lines[1].startswith(f"  data {own / 'documents.jsonl'}@train: expected SHA-256 ")


@pytest.fixture
def moved(finished, config, files, tmp_path):
    """Copies of the finished run, its files and its prepared data, that a test may change: the run and the files."""
    shutil.copytree(files, tmp_path / "files", ignore=shutil.ignore_patterns(".incomplete-*", ".lock"))
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / name for name in ("config.yaml", "manifest.jsonl", "ppo/ledger.jsonl")):
        path.write_text(path.read_text(encoding="utf-8").replace(str(files), str(tmp_path / "files")), encoding="utf-8")
    for entry in [f"{name}.jsonl@train" for name in ("documents", "demonstrations", "comparisons", "prompts")]:
        old, new = (path_of(tmp_path / "run", f"{place}/{entry}") for place in (files, tmp_path / "files"))
        old.rename(new)
    return tmp_path / "run", tmp_path / "files"


def changed_lines(run_dir, monkeypatch):
    """What has changed here, by the run's directory; devices are not looked at."""
    run, attempts = load_config(run_dir / "config.yaml"), read_attempts(run_dir)
    as_it_was(attempts, monkeypatch)
    return conditions(run, attempts, run_dir)


def replaced(path, number, text):
    """Write another text to a line of a file, from 0 on; None takes the line away."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number : number + 1] = [] if text is None else [text]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_a_row_that_changed_is_named_with_the_step_that_read_it(moved, monkeypatch):
    run_dir, files = moved
    assert changed_lines(run_dir, monkeypatch) == []
    [row] = rows_of(run_dir / "ppo" / "ledger.jsonl")[2]["rows"][:1]
    path = files / "prompts.jsonl"
    replaced(path, row, json.dumps({"prompt": "another film"}))
    [line] = changed_lines(run_dir, monkeypatch)
    assert line.startswith(f"data {path}@train: expected SHA-256 ")
    assert line.endswith(f": row {row} ({path}:{row + 1}) is another; ppo read it first at step 2")
    replaced(path, 29, None)
    [line] = changed_lines(run_dir, monkeypatch)
    assert f"row {row} ({path}:{row + 1}) is another; 30 rows then, 29 now" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: replaced(path, 39, None), "row 39 is not there any more; 40 rows then, 39 now"),
        (lambda path: replaced(path, 39, path.read_text().splitlines()[39] + '\n{"prompt": "a", "completion": "b"}'),
         "row 40 ({path}:41) is new; 40 rows then, 41 now"),
        (lambda path: [replaced(path, row, '{"prompt": "a", "completion": "b"}') for row in (3, 5, 8)],
         "row 3 ({path}:4) is another, and 2 more"),
    ],
)  # fmt: skip
def test_rows_that_came_and_went(moved, monkeypatch, change, expected):
    run_dir, files = moved
    path = files / "demonstrations.jsonl"
    change(path)
    [line] = changed_lines(run_dir, monkeypatch)
    assert line.endswith(expected.replace("{path}", str(path)))


@pytest.fixture
def here(finished, monkeypatch):
    """Conditions of the finished run that are as they were but for what a test changes; devices are not looked at."""
    run, attempts = load_config(finished / "config.yaml"), read_attempts(finished)
    as_it_was(attempts, monkeypatch)
    return run, attempts


def as_it_was(attempts, monkeypatch):
    """Devices, mesh and flags are those of the last attempt."""
    then = {name: attempts[-1][name] for name in ("devices", "mesh", "flags", "settings", "process")}

    def now(run):
        return describe(run) | then

    monkeypatch.setattr("rlhfjax.runs.reproduce.describe", now)
    monkeypatch.setattr("rlhfjax.runs.inputs.meshes_now", lambda run: {"mesh": then["mesh"]})
    monkeypatch.setattr("rlhfjax.runs.inputs.first_target", lambda run, mesh: Target(**attempts[-1]["target"]))


def test_nothing_has_changed_here(here):
    assert conditions(*here) == []


@pytest.mark.parametrize("manifest", [True, False], ids=["files", "records"])
def test_a_flipped_byte_of_prepared_records_is_named(here, files, tmp_path, manifest):
    # fails when only the digests noted at preparation are compared: seen
    run, attempts = here
    shutil.copytree(files / "prepared", tmp_path / "prepared", ignore=shutil.ignore_patterns(".incomplete-*"))
    folder = prepare_file(files / "prompts.jsonl", "prompt", tmp_path / "prepared")  # which is there
    [path] = folder.glob("*.array_record*")
    data = bytearray(path.read_bytes())
    if not manifest:  # as an older version prepared it
        (folder / MANIFEST).unlink()
    used = [place for place, value in enumerate(data) if value]  # the rest is padding, which holds no record
    data[used[len(used) // 2] if not manifest else -1] ^= 1
    path.write_bytes(data)
    found = conditions(run.model_copy(update={"data_dir": str(tmp_path / "prepared")}), attempts)
    named = [line for line in found if line.startswith(f"data {files / 'prompts.jsonl'}@train: ")]
    assert named
    assert [line for line in found if line not in named] == [
        f"config.yaml: data_dir: expected {str(files / 'prepared')!r}, got {str(tmp_path / 'prepared')!r}"
    ]


def test_every_attempt_counts_that_trained_something(here):
    run, attempts = here
    other = copy.deepcopy(attempts[-1]) | {"attempt": 1}
    other["packages"]["flax"] = "0.1"
    idle = copy.deepcopy(other) | {"stages": []}
    last = attempts[-1] | {"attempt": 2}
    version = attempts[-1]["packages"]["flax"]
    assert conditions(run, [other, last]) == [f"attempt 1: package flax: expected 0.1, got {version}"]
    assert conditions(run, [idle, last]) == []


def test_what_cannot_be_reproduced_at_all(finished, other, tmp_path):
    with pytest.raises(ConfigError, match=r"got no config\.yaml in it"):
        reproduce(tmp_path, tmp_path / "new", only_check=True)
    (other / "ppo" / "complete.json").unlink()
    with pytest.raises(ConfigError, match="expected a finished run, got one without ppo"):
        reproduce(other, tmp_path / "new", only_check=True)
    with pytest.raises(ConfigError, match="expected a new directory to reproduce in"):
        reproduce(finished, other, only_check=False)


@pytest.mark.faults
def test_the_whole_recipe_again(finished, command, tmp_path):
    code, _, err = command("reproduce", finished, "--run-dir", tmp_path / "again")
    assert code == 0, err
    assert "tokenizer, pretrain, sft, reward, ppo, evaluate are equal to those of" in err
