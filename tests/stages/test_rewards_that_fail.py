"""A reward function that fails in the middle of a run: the end that docs/rewards.md promises, and nothing is lost."""

import json
import shutil
from functools import partial

import jax
import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.config import load_config
from rlhfjax.errors import DataError, Diverged, RewardError
from rlhfjax.runs import checks, run_recipe
from rlhfjax.sharding import make_mesh
from rlhfjax.stages import online
from stages.conftest import assert_same_bits, rows_of, saved
from stages.once import once
from stages.tiny_recipe import recipe, write_jsonl

BEFORE = ("tokenizer", "pretrain", "sft")
STEPS, SIZE = 6, 16
FUNCTION = """
import os
import pathlib
import subprocess
import time

CALLS = pathlib.Path(__file__).with_name("calls")  # a word for each call to come


def letters(examples):
    print("called")
    word, _, rest = CALLS.read_text().partition(" ")
    CALLS.write_text(rest)
    scores = [len(example.response) / 10 for example in examples]
    match word:
        case "raises":
            raise KeyError("gold")
        case "nan":
            scores[1] = float("nan")
        case "few":
            scores.pop()
        case "dies":
            os._exit(3)
        case "hangs":
            time.sleep(1e6)
        case "forks":
            os.fork()
        case "spawns":
            subprocess.Popen(["sleep", "10000"])
        case "edits":
            with open(__file__, "a") as file:
                file.write("# a word more")
    return scores
"""


@pytest.fixture(scope="module")
def programs():
    """What the first run of this module compiles for the others."""
    return {}


@pytest.fixture(scope="module")
def stage_in(files, finished, programs):
    """Runs RLOO on one device in a folder after the finished stages, once more if it is there: its directory.

    `todo` is what the function does in each of its calls, `term` more of what the configuration says of it.
    """

    def run(folder, name, todo="", every=100, **term):
        run_dir, tree = folder / name, recipe(files)
        if not (folder / "mine.py").exists():
            (folder / "mine.py").write_text(FUNCTION, encoding="utf-8")
            write_jsonl(folder / "asked.jsonl", ({"prompt": p} for p in ("the film", "a story was", "good music")))
        shared = {key: tree["stages"]["ppo"][key] for key in ("batch", "sampling", "optimizer")}
        shared |= {"steps": STEPS, "data": [{"source": str(folder / "asked.jsonl")}], "groups": {"size": 2}}
        shared |= {"missing_eos": {"mode": "keep"}, "rewards": [{"function": f"{folder}/mine.py:letters"} | term]}
        tree["stages"] = {key: tree["stages"][key] for key in BEFORE[1:]} | {"rloo": shared}
        tree |= {"checkpoints": {"every": every, "keep": STEPS}, "logging": {"samples_every": 1, "samples": SIZE}}
        (folder / "run.yaml").write_text(json.dumps(tree), encoding="utf-8")
        (folder / "calls").write_text(todo, encoding="utf-8")
        if not run_dir.exists():
            run_dir.mkdir()
            for earlier in BEFORE:
                shutil.copytree(finished / earlier, run_dir / earlier)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(online, "Ahead", once(programs))
            patch.setattr(checks, "make_mesh", lambda *_, **__: make_mesh(devices=jax.devices()[:1]))
            run_recipe(load_config(folder / "run.yaml"), run_dir, only="rloo")
        return run_dir / "rloo"

    return run


@pytest.fixture
def stage(stage_in, tmp_path):
    """The same in a folder of the test's own."""
    return partial(stage_in, tmp_path)


@pytest.fixture(scope="module")
def straight(stage_in, tmp_path_factory):
    """The directory of the stage where nothing happened."""
    return stage_in(tmp_path_factory.mktemp("straight"), "straight")


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def checkpoint(folder, step):
    return saved(folder / "checkpoints" / str(step))


def test_a_failure_stops_the_run_behind_its_last_whole_iteration(stage, straight, tmp_path):
    """Five times over, it ends with the bits of a run in which nothing happened; `forks` and `spawns` do no harm."""
    folder = tmp_path / "run" / "rloo"
    ends = [
        ("raises", r"step 1: KeyError: 'gold' \(.*mine.py:\d+\)", []),
        ("forks few", r"step 2: expected 16 numbers, one for each example, got 15", [1]),
        ("nan", r"step 2: expected a finite number, got nan \(1 of 16 responses, the first is number 2\)", [1]),
        ("spawns raises", r"step 3: KeyError: 'gold'", [1, 2]),
        ("edits dies", r"step 4: its process ended with exit code 3", [1, 2, 3]),
    ]
    for todo, words, steps in ends:
        with pytest.raises(RewardError, match=f"reward letters, {words}.*docs/rewards.md"):
            stage("run", todo)
        line = rows_of(tmp_path / "run" / "manifest.jsonl")[-1]
        assert (line["status"], line["exit_code"]) == ("failed", 3)
        assert steps_in(folder) == steps
        assert len(rows_of(folder / "metrics.jsonl")) == len(steps) if steps else not steps
        assert not (folder / "complete.json").exists()
    with pytest.raises(DataError, match=r"mine\.py has changed since this stage began.*put the file back"):
        stage("run")
    (tmp_path / "mine.py").write_text(FUNCTION, encoding="utf-8")
    assert_same_bits(checkpoint(stage("run"), STEPS), checkpoint(straight, STEPS))


def test_skip_leaves_out_the_update_to_the_bit(stage, capsys):
    """The policy and its optimizer after an iteration are those before it; the run goes on to its end."""
    folder = stage("run", "right raises nan right few dies", every=1, on_error="skip")
    failures = [row["objective/reward_failures"] for row in rows_of(folder / "metrics.jsonl")]
    assert failures == [0, SIZE, 1, 0, SIZE, SIZE]
    states = [checkpoint(folder, step) for step in range(1, STEPS + 1)]
    trained = [name for name in states[0] if name.startswith("policy")]
    assert trained
    for before, after, failed in zip(states, states[1:], failures[1:], strict=False):
        same = all(before[name].tobytes() == after[name].tobytes() for name in trained)
        assert same == bool(failed)
    assert capsys.readouterr().err.count("the update is skipped; more of this is only counted") == 1


def test_too_many_skips_in_a_row_end_the_run_and_say_that_rewards_failed(stage, tmp_path):
    with pytest.raises(
        Diverged, match=r"diverged at step 4: 3 steps in a row.*; rewards failed \(objective/reward_fail"
    ):
        stage("run", "right raises raises raises", every=1, on_error="skip")
    assert rows_of(tmp_path / "run" / "manifest.jsonl")[-1]["exit_code"] == 4
    assert steps_in(tmp_path / "run" / "rloo") == [1, 2, 3]


def test_value_stands_in_the_place_of_what_is_missing(stage):
    folder = stage("run", "right raises nan few dies right", on_error="value", value=-2.0)
    wrong = {2: range(SIZE), 3: [1], 4: range(SIZE), 5: range(SIZE)}
    rows = rows_of(folder / "samples.jsonl")
    for step in range(1, STEPS + 1):
        found = [row for row in rows if row["step"] == step]
        assert len(found) == SIZE
        for number, row in enumerate(found):
            missing = number in wrong.get(step, ())
            assert row["score"] == pytest.approx(-2.0 if missing else len(row["response"]) / 10)
    failures = [row["objective/reward_failures"] for row in rows_of(folder / "metrics.jsonl")]
    assert failures == [len(wrong.get(step, ())) for step in range(1, STEPS + 1)]
    assert steps_in(folder) == [STEPS]


def test_an_edit_in_the_middle_is_told_and_the_run_cannot_be_reproduced(stage, straight, tmp_path, capsys):
    """What was loaded goes on to the end: the bits are those of a run without the edit."""
    folder = stage("run", "right edits")
    assert capsys.readouterr().err.count("mine.py was edited; what was loaded when this run began") == 1
    assert_same_bits(checkpoint(folder, STEPS), checkpoint(straight, STEPS))
    said = CliRunner().invoke(app, ["reproduce", str(tmp_path / "run"), "--only-check"], prog_name="rlhfjax")
    assert (said.exit_code, "rewards of rloo: " in said.stderr) == (4, True), said.output


def test_a_hang_ends_at_its_limit(stage):
    """It hangs in every call, so that no answer has to be there within the limit."""
    folder = stage("run", "hangs " * STEPS, on_error="value", value=0.5, timeout=0.5)
    rows = rows_of(folder / "metrics.jsonl")
    assert [row["objective/reward_failures"] for row in rows] == [SIZE] * STEPS
    assert [row["objective/reward/letters"] for row in rows] == [0.5] * STEPS
    with pytest.raises(RewardError, match=r"step 1: no answer within 0.5 s; its process was killed \(all 16"):
        stage("other", "hangs", timeout=0.5)


@pytest.mark.faults
def test_a_hang_loses_no_iteration(stage, tmp_path):
    """With a limit that lets calls which do not hang answer on any machine."""
    straight = stage("straight", timeout=90.0)
    with pytest.raises(RewardError, match="step 3: no answer within 90 s"):
        stage("run", "right right hangs", timeout=90.0)
    assert steps_in(tmp_path / "run" / "rloo") == [2]
    assert_same_bits(checkpoint(stage("run", timeout=90.0), STEPS), checkpoint(straight, STEPS))
