"""Every prompt of an epoch once: what the ledgers of real runs say, against the prompts that were sampled from."""

import fcntl
import json
import random
import shutil
import signal
import time

import pytest

from rlhfjax.runs.ledger import require_right, stages_with_ledgers
from stages.conftest import rows_of
from stages.tiny_recipe import STEPS

TRAINED = {"pretrain", "sft", "reward", "ppo"}
PROMPTS = 16  # of an iteration
PATIENCE = 1800  # seconds, of a busy machine


def texts_of(files):
    return [json.loads(line)["prompt"] for line in (files / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_sampled(run_dir, texts, first_rows):
    """The rows of the ledger are those whose texts the policy was asked, by samples.jsonl."""
    ledger = {line["step"]: line for line in rows_of(run_dir / "ppo" / "ledger.jsonl")[1:]}
    asked = {}
    for row in rows_of(run_dir / "ppo" / "samples.jsonl"):
        asked.setdefault(row["step"], []).append(row["prompt"])
    assert asked.keys() == ledger.keys()
    for step, prompts in asked.items():
        assert prompts == [texts[row] for row in ledger[step]["rows"][:first_rows]]


def test_it_says_the_prompts_that_were_read(finished, files):
    assert {path.name for path in stages_with_ledgers(finished)} == TRAINED
    heading, *lines = rows_of(finished / "ppo" / "ledger.jsonl")
    [source] = heading["sources"]
    assert (source["name"], source["count"]) == (f"{files / 'prompts.jsonl'}@train", 30)
    assert [len(line["rows"]) for line in lines] == [PROMPTS] * STEPS
    assert_sampled(finished, texts_of(files), 4)
    first = [row for line in lines for row in line["rows"]][: heading["epoch"]]
    kept = {row for first_row, end in source["kept"] for row in range(first_row, end)}
    assert set(first) == kept
    assert len(first) == len(kept)
    assert "4 steps, 64 rows; each row once an epoch" in require_right(finished / "ppo")
    for stage in ("pretrain", "sft", "reward"):
        assert f"{STEPS} steps" in require_right(finished / stage)


def test_verify_names_the_step_of_a_prompt_that_comes_twice(finished, command, tmp_path):
    shutil.copytree(finished / "ppo", tmp_path / "ppo")
    path = tmp_path / "ppo" / "ledger.jsonl"
    lines = rows_of(path)
    lines[2]["rows"][1] = lines[2]["rows"][0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, out, err = command("verify", tmp_path / "ppo")
    assert code == 4
    assert f"{path}: step 2: row {lines[2]['rows'][0]} of " in out
    assert "1 file is not what was written" in err


class Run:
    """PPO of the tiny recipe in processes that are killed; what it has come to is read from its directory."""

    def __init__(self, start, config, folder):
        self.start, self.folder, self.stage = start, folder, folder / "ppo"
        guards = ["reliability.guards.non_finite=1", "reliability.guards.on_divergence=rollback"]
        self.words = ["run", config, "--run-dir", folder, "--only", "ppo", "reliability.heartbeat=60", *guards]
        self.words += ["stages.ppo.steps=80", "logging.samples=16", "checkpoints.every=2", "checkpoints.keep=4"]

    def launched(self, processes, devices, fault=None):
        layout = ["-n", processes, "--devices-per-process", devices, "--restarts-failed", 0]
        return self.start("launch", "local", *layout, "--", *self.words, fault=fault)

    def saved(self):
        steps = (self.stage / "checkpoints").glob("*")
        return max((int(path.name) for path in steps if path.name.isdigit()), default=0)

    def kill_after(self, step, wait, *layout, fault=None):
        """Kill all of them so many seconds after a step is saved."""
        launcher, until = self.launched(*layout, fault=fault), time.monotonic() + PATIENCE
        while self.saved() < step:
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(wait)
        assert launcher.poll() is None, launcher.communicate()
        launcher.send_signal(signal.SIGKILL)  # with which its processes end
        launcher.communicate()
        with (self.folder / ".lock").open("a") as lock:  # which the first of them holds until then
            fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.faults
def test_over_ten_kills_a_rollback_and_another_layout(finished, files, config, start, tmp_path):
    """Two processes, killed five times and rolled back once; then one with two devices, killed five times."""
    shutil.copytree(finished, tmp_path / "run", ignore=lambda folder, names: later(folder, names, finished))
    run, draw, left_out = Run(start, config, tmp_path / "run"), random.Random(5), 0
    for kill in range(10):
        layout, saved = (2, 1) if kill < 5 else (1, 2), run.saved()
        if kill == 3:
            # Found at the step after the next save, it goes back to the last one before that.
            run.kill_after(saved + 4, draw.uniform(0, 0.3), *layout, fault=f"nan@update:{saved + 3}")
            left_out = 3 * PROMPTS
        else:
            run.kill_after(saved + 2, draw.uniform(0, 0.3), *layout)
        assert not (run.stage / "complete.json").exists(), "it was over before ten kills"
        require_right(run.stage)
    process = run.launched(1, 2)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    said = require_right(run.stage)
    assert f"80 steps, {80 * PROMPTS:,} rows, {left_out} more left out by rollbacks; each row once an epoch" in said
    assert_sampled(run.folder, texts_of(files), PROMPTS)
    attempts = [(line["process"][1], len(line["devices"])) for line in rows_of(run.folder / "manifest.jsonl")[1:]]
    assert attempts == [(2, 2)] * 5 + [(1, 2)] * 6


def later(folder, names, root):
    """What of the finished run is not copied."""
    kept = {"tokenizer", "pretrain", "sft", "reward", "config.yaml", "manifest.jsonl"}
    return {*names} - kept if folder == str(root) else set()
