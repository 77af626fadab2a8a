"""One run in two processes: the numbers of one, one of them writes, and what they do when one of them fails."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import forked

from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STEPS

TRAINED = ("pretrain", "sft", "reward", "ppo")
PATIENCE = 1800  # seconds, of a busy machine
HEARTBEAT = "reliability.heartbeat=60"  # where none is to be missed, however busy the machine is


@pytest.fixture(scope="module")
def launched(command):
    """Runs the command line in so many processes: exit code, stdout, stderr."""

    def ran(processes, devices, *words, options=()):
        return command("launch", "local", "-n", processes, "--devices-per-process", devices, *options, "--", *words)

    return ran


@pytest.fixture(scope="module")
def two(launched, config, tmp_path_factory):
    """A whole run in two processes with a device each: its directory, and what was said."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    code, _, err = launched(2, 1, "run", config, HEARTBEAT, "--run-dir", run_dir)
    assert code == 0, err
    return run_dir, err


@pytest.fixture(scope="module")
def one(launched, config, tmp_path_factory):
    """The same in one process with two devices."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    code, _, err = launched(1, 2, "run", config, HEARTBEAT, "--run-dir", run_dir)
    assert code == 0, err
    return run_dir


def numbers(path):
    """Rows of metrics.jsonl without what a clock says."""
    rows = rows_of(path)
    return [{name: row[name] for name in row if not name.startswith(("timing/", "perf/"))} for row in rows]


def assert_same_run(run_dir, other, stages=TRAINED):
    for stage in stages:
        assert numbers(run_dir / stage / "metrics.jsonl") == numbers(other / stage / "metrics.jsonl")
        assert_same_bits(*(saved(place / stage / "checkpoints" / str(STEPS)) for place in (run_dir, other)))
    assert rows_of(run_dir / "ppo" / "samples.jsonl") == rows_of(other / "ppo" / "samples.jsonl")


@pytest.mark.faults
def test_two_processes_give_the_numbers_of_one_device(two, finished):
    names = {"loss/train", "loss/validation", "train/rm/loss", "eval/rm/accuracy", "grad/norm"}
    names |= {"objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "loss/ptx", "grad/policy_norm"}
    for stage in TRAINED:
        many, alone = (rows_of(place / stage / "metrics.jsonl") for place in (two[0], finished))
        for row, expected in zip(many, alone, strict=True):
            wanted = {name: expected[name] for name in names & expected.keys()}
            assert len(wanted) > 1
            assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    samples = [rows_of(place / "ppo" / "samples.jsonl") for place in (two[0], finished)]
    assert [(row["step"], row["prompt"]) for row in samples[0]] == [(row["step"], row["prompt"]) for row in samples[1]]
    losses = [json.loads((place / "evaluate" / "evaluation.json").read_text()) for place in (two[0], finished)]
    for stage, expected in losses[1]["heldout_losses"].items():
        assert losses[0]["heldout_losses"][stage] == pytest.approx(expected, abs=1e-4)


@pytest.mark.faults
def test_two_processes_give_the_bits_of_one_with_as_many_devices(two, one):
    assert_same_run(two[0], one)
    made, expected = (json.loads((place / "evaluate" / "evaluation.json").read_text()) for place in (two[0], one))
    for changing in ("date", "stage_seconds"):
        del made[changing], expected[changing]
    assert made == expected


@pytest.mark.faults
def test_only_the_first_process_writes(two, finished):
    run_dir, said = two
    [line] = rows_of(run_dir / "manifest.jsonl")
    assert (line["status"], line["exit_code"]) == ("finished", 0)
    for stage in TRAINED:
        assert [row["step"] for row in rows_of(run_dir / stage / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert "[p0] ppo: started" in said
    # meant to catch processes that all report
    assert [line for line in said.splitlines() if not line.startswith("[p0] ") and "[Gloo]" not in line] == []
    for place in ("", *TRAINED, "evaluate"):
        assert {path.name for path in (run_dir / place).iterdir()} == {
            path.name for path in (finished / place).iterdir()
        }


def start_two(environment, words, folders=(None, None), prefix=((), ())):
    """Two processes by explicit flags: their exit codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index, folder in enumerate(folders):
        flags = ["--coordinator", coordinator, "--num-processes", "2", "--process-id", str(index)]
        own = [str(word) for word in (*words, *prefix[index], *flags)]
        if not folder:
            started.append(forked(*own, environment=environment))
            continue
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "rlhfjax.cli", *own],
                cwd=folder,
                env=environment | {"PYTHONPATH": str(folder)},  # code of its own
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=PATIENCE)[1] for process in started]
    return [process.returncode for process in started], said


def test_other_settings_are_refused_before_anything_begins(environment, config, tmp_path):
    run_dir = tmp_path / "run"
    codes, said = start_two(environment, ["run", config, "--run-dir", run_dir], prefix=((), ("seed=4",)))
    assert codes == [2, 2]
    expected = (
        "error: processes do not agree on configuration seed: expected 3, as process 0 has it, got 4 in process 1."
    )
    assert expected in said[0]
    assert "error:" not in said[1]  # once is enough
    assert not run_dir.exists() or not any(path.name != ".lock" for path in run_dir.iterdir())


def test_a_process_that_waits_in_vain_says_for_whom(start, config, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        flags = ("--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--num-processes", 3, "--process-id", 0)
    process = start("run", config, HEARTBEAT, "reliability.deadlines.join=1", "--run-dir", tmp_path / "run", *flags)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 42
    [line] = err.splitlines()
    expected = (
        "expected 3 processes within 1 s, got 1, without process 1, 2; see their logs, and start all of them again"
    )
    assert line.endswith(expected)
    assert not (tmp_path / "run").exists()


def processes_of(launcher):
    """The children of a launcher by their place, as they are now."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                variables = (path / "environ").read_bytes().split(b"\0")
                [place] = [v.partition(b"=")[2] for v in variables if v.startswith(b"RLHFJAX_PROCESS_ID=")]
                found[int(place)] = int(path.name)
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.faults
@pytest.mark.parametrize(
    ("index", "number"),
    [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)],
    ids=["worker dies", "coordinator dies", "worker freezes", "coordinator freezes"],
)
def test_the_others_end_and_all_are_started_again(two, config, start, tmp_path, index, number):
    finished, _ = two
    run_dir = copy_until(finished, "ppo", tmp_path)
    words = ("run", config, "reliability.heartbeat=15", "--run-dir", run_dir)
    launcher = start("launch", "local", "-n", 2, "--devices-per-process", 1, "--", *words)
    try:
        until = time.monotonic() + PATIENCE
        while not any((run_dir / "ppo" / "checkpoints").glob("1")):
            assert time.monotonic() < until
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.01)
        children = processes_of(launcher)
        os.kill(children[index], number)
        struck = time.monotonic()
        while any(running(child) for child in children.values()):
            assert time.monotonic() < struck + PATIENCE, "the others wait for the one that was struck"
            time.sleep(0.05)
        _, err = launcher.communicate(timeout=PATIENCE)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == 0, err
    died = r"failed with exit code (134|137); restart 1 of 3"
    assert re.search(rf"launch: ({died}|preempted with exit code 42; restart 1 of 100)", err)
    assert_same_run(run_dir, finished, ["ppo"])
    before, last = [line["status"] for line in rows_of(run_dir / "manifest.jsonl")][-2:]
    assert (before != "finished", last) == (True, "finished")


def copy_until(finished, stage, folder):
    """A copy of a run without a stage and those after it."""
    later = ("pretrain", "sft", "reward", "ppo", "evaluate")
    gone = {*later[later.index(stage) :], "report.html"}
    shutil.copytree(finished, folder / "run", ignore=lambda place, _: gone if place == str(finished) else ())
    return folder / "run"


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.faults
@pytest.mark.parametrize("what", ["data", "tokenizer", "code"])
def test_other_data_code_or_tokenizer_are_refused(environment, files, config, two, tmp_path, what):
    made = json.loads(config.read_text())
    places = [tmp_path / "a", tmp_path / "b"]
    for number, place in enumerate(places):
        place.mkdir()
        shutil.copytree(files, place / "files")
        shutil.copytree(Path(__file__).parents[2] / "rlhfjax", place / "rlhfjax")
        text = json.dumps(made).replace(str(files), "files")
        (place / "tiny.yaml").write_text(text, encoding="utf-8")
        if what == "tokenizer":
            shutil.copytree(two[0] / "tokenizer", place / "run" / "tokenizer")
        if number and what == "data":
            path = place / "files" / "prompts.jsonl"
            path.write_text(path.read_text().replace("the", "teh", 1))
        if number and what == "code":
            with (place / "rlhfjax" / "functional" / "kl.py").open("a") as file:
                file.write("# other\n")
        if number and what == "tokenizer":
            shutil.rmtree(place / "run" / "tokenizer")
            made_here = "from rlhfjax.text.tokenizer import Tokenizer; from pathlib import Path; import sys; "
            made_here += "Tokenizer.train(['one two three four'] * 9, 290).save(Path('run/tokenizer'))"
            subprocess.run([sys.executable, "-c", made_here], cwd=place, check=True, env=environment)
            shutil.copy(two[0] / "tokenizer" / "complete.json", place / "run" / "tokenizer")
    codes, said = start_two(environment, ["run", "tiny.yaml", "--run-dir", "run"], folders=places)
    assert codes == [3 if what == "data" else 2] * 2, said
    named = {"data": "data files/prompts.jsonl@train", "tokenizer": "tokenizer", "code": "code"}[what]
    assert f"error: processes do not agree on {named}: expected " in said[0]
    assert "in process 1. All need the same" in said[0]
    assert not any((places[0] / "run" / stage).exists() for stage in TRAINED)


@pytest.mark.faults
def test_another_number_of_processes_continues_and_says_so(two, config, launched, tmp_path):
    run_dir = copy_until(two[0], "ppo", tmp_path)
    code, _, err = launched(1, 1, "run", config, HEARTBEAT, "--run-dir", run_dir, "--only", "ppo")
    assert code == 0, err
    assert "not bitwise" in err
    for row, expected in zip(
        numbers(run_dir / "ppo/metrics.jsonl"), numbers(two[0] / "ppo/metrics.jsonl"), strict=True
    ):
        names = ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "loss/ptx"]
        assert {name: row[name] for name in names} == pytest.approx({name: expected[name] for name in names}, abs=1e-4)
    before, now = (rows_of(place / "ppo" / "samples.jsonl") for place in (two[0], run_dir))
    assert [(row["step"], row["prompt"]) for row in now] == [(row["step"], row["prompt"]) for row in before]


@pytest.mark.faults
def test_a_run_that_dies_again_and_again_is_given_up(two, config, environment, tmp_path):
    run_dir = copy_until(two[0], "sft", tmp_path)
    options = ["-n", 2, "--devices-per-process", 1]
    words = ["launch", "local", *options, "--", "run", config, HEARTBEAT, "--run-dir", run_dir]
    done = subprocess.run(
        [sys.executable, "-m", "rlhfjax.cli", *map(str, words)],
        env=environment | {"RLHFJAX_FAULT": "sigkill@sft:1:1", "RLHFJAX_ALLOW_FAULTS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 137
    assert f"launch: two restarts got no step further in {run_dir}; not started again" in done.stderr
    assert done.stderr.count("sft: started") == 3


@pytest.mark.faults
def test_killed_at_the_ninth_save_of_several_devices_each_they_go_on_elsewhere(launched, config, environment, tmp_path):
    # what a save alone does there is in tests/training/test_saving_together.py
    gone = [f"stages.{stage}=null" for stage in ("sft", "reward", "ppo", "evaluate")]
    words = ["run", config, HEARTBEAT, "stages.pretrain.steps=10", *gone]
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    code, _, err = launched(1, 1, *words, "--run-dir", alone)
    assert code == 0, err
    split = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    options = ["-n", 2, "--devices-per-process", 4, "--restarts-failed", 0]
    done = subprocess.run(
        [sys.executable, "-m", "rlhfjax.cli", "launch", "local", *map(str, options), "--"]
        + [str(word) for word in (*words, *split, "--run-dir", run_dir)],
        env=environment | {"RLHFJAX_FAULT": "sigkill@save:9:1", "RLHFJAX_ALLOW_FAULTS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 137, done.stderr
    steps = sorted(int(path.name) for path in (run_dir / "pretrain" / "checkpoints").iterdir() if path.name.isdigit())
    assert steps[-1] in (8, 9)
    wanted = numbers(alone / "pretrain" / "metrics.jsonl")
    for processes, devices, axes in ((1, 1, ()), (2, 2, ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"))):
        place = shutil.copytree(run_dir, tmp_path / f"{processes} x {devices}")
        code, _, err = launched(processes, devices, *words, *axes, "--run-dir", place)
        assert code == 0, err
        rows = numbers(place / "pretrain" / "metrics.jsonl")
        for name in ("loss/train", "grad/norm"):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in wanted], abs=1e-4)
