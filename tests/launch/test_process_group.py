"""Processes that live and die together: exit codes, restarts, signals, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhfjax.cli.launching import run_dir_of
from rlhfjax.launch import process_group
from rlhfjax.launch.process_group import Restarts, progress, supervise

PATIENCE = 60  # seconds, of a busy machine


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Runs a Python script in the place of `rlhfjax`: exit code, what was said, and how often each process started.

    The script has `index` and `attempt`, and the folder `here`.
    """

    def ran(script, count=2, grace=1.0, restarts=None, run_dir=None):
        begin = (
            "import os, sys, time, signal, pathlib\n"
            "index = int(os.environ['RLHFJAX_PROCESS_ID'])\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "(here / f'{index}-{os.getpid()}').touch()\n"
            "attempt = len(list(here.glob(f'{index}-*')))\n"
        )
        (tmp_path / "script.py").write_text(begin + script, encoding="utf-8")
        monkeypatch.setattr(process_group, "COMMAND", (sys.executable, str(tmp_path / "script.py")))
        monkeypatch.setattr(process_group, "_LONGEST_DELAY", 0.0)
        said = []
        code = supervise([], count, None, restarts or Restarts(0, 0, run_dir), grace, said.append)
        return code, said, [len(list(tmp_path.glob(f"{index}-*"))) for index in range(count)]

    return ran


def pids(folder):
    return [int(path.name.split("-")[1]) for path in folder.glob("[0-9]-*")]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(true, what):
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.02)


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("os.abort()", 134)])
def test_the_first_failure_ends_the_others_and_is_passed_on(supervised, tmp_path, end, code):
    script = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif index == 1:\n    {end}\ntime.sleep(600)\n"
    got, said, _ = supervised(script, count=3)
    assert got == code
    assert said == [f"launch: process 1 ended with exit code {code}; the others have to end"]
    assert not any(map(alive, pids(tmp_path)))


def test_of_failures_at_once_the_one_that_others_died_of_is_passed_on(supervised, monkeypatch):
    # meant to catch the order of process numbers: jax aborts 0 because 1 ended with an error
    codes = {0: -6, 1: 2, 2: 42}
    monkeypatch.setattr(process_group.Group, "_pump", lambda *_: time.sleep(1.0))  # all have ended when it looks
    script = f"code = {codes}[index]\nos.abort() if code < 0 else sys.exit(code)\n"
    assert supervised(script, count=3)[0] == 2


def test_all_goes_well(supervised, capfd):
    code, said, started = supervised(
        "print('out', index)\nprint('unfinished', end='')\nprint('err', file=sys.stderr)\n"
    )
    assert (code, said, started) == (0, [], [1, 1])
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[p0] out 0", "[p0] unfinished", "[p1] out 1", "[p1] unfinished"]
    assert sorted(err.splitlines()) == ["[p0] err", "[p1] err"]


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_what_would_end_the_same_is_not_started_again(supervised, code):
    got, _, (started,) = supervised(f"sys.exit({code})", count=1, restarts=Restarts(5, 5, None))
    assert (got, started) == (code, 1)


def test_preemptions_and_deaths_have_budgets_of_their_own(supervised, tmp_path):
    # attempts: saved, died, saved, died and no more; each attempt gets a step further
    script = (
        "if index == 0:\n"
        "    (here / 'run' / 'ppo' / 'checkpoints' / str(attempt)).mkdir(parents=True)\n"
        "    sys.exit(42) if attempt % 2 else os.kill(os.getpid(), 9)\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "run").mkdir()
    code, said, (started, _) = supervised(script, restarts=Restarts(9, 1, tmp_path / "run"))
    assert (code, started) == (137, 4)
    assert "launch: failed 2 times, and --restarts-failed is 1; not started again" in said
    assert sum("preempted with exit code 42; restart" in line for line in said) == 2


def test_a_run_that_gets_no_further_is_given_up(supervised, tmp_path):
    (tmp_path / "run").mkdir()
    code, said, (started,) = supervised("os.abort()", count=1, restarts=Restarts(50, 50, tmp_path / "run"))
    assert (code, started) == (134, 3)
    assert said[-1] == f"launch: two restarts got no step further in {tmp_path / 'run'}; not started again"


def test_a_run_that_gets_further_is_not_given_up(supervised, tmp_path):
    # fails when restarts are counted whatever they reach: seen
    script = "(here / 'run' / 'sft' / 'checkpoints' / str(attempt)).mkdir(parents=True)\nif attempt < 6: os.abort()\n"
    (tmp_path / "run").mkdir()
    assert supervised(script, count=1, restarts=Restarts(0, 50, tmp_path / "run"))[0] == 0


def test_progress_is_finished_stages_and_saved_steps(tmp_path):
    assert progress(None) == progress(tmp_path / "no") == (0, 0)
    for path in ("sft/checkpoints/2", "sft/checkpoints/10", "ppo/checkpoints/3", "ppo/checkpoints/9.part"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "sft" / "complete.json").touch()
    assert progress(tmp_path) == (1, 13)


DRIVER = """
import sys
from rlhfjax.launch import process_group
from rlhfjax.launch.process_group import Restarts, supervise
process_group.COMMAND = (sys.executable, sys.argv[1])
sys.exit(supervise([], 2, None, Restarts(5, 5, None), 60.0, lambda text: print(text, file=sys.stderr)))
"""
CHILD = """
import os, pathlib, signal, sys, time
from rlhfjax.launch.process_group import die_with_launcher
die_with_launcher()
here = pathlib.Path(__file__).parent
name = f"{os.environ['RLHFJAX_PROCESS_ID']}-{os.getpid()}"
got = []
signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
signal.signal(signal.SIGINT, lambda number, _: got.append(number))
(here / name).touch()
while True:
    time.sleep(0.05)
    (here / f"got-{name}").write_text(" ".join(map(str, got)))
    if got and LEAVES:
        time.sleep(0.5)
        sys.exit(42)
"""


@pytest.fixture
def launcher(tmp_path):
    """A launcher in a process of its own, and its two children, which leave with 42 at a signal or not."""
    started = []

    def start(leaves):
        (tmp_path / "child.py").write_text(CHILD.replace("LEAVES", str(leaves)), encoding="utf-8")
        words = [sys.executable, "-c", DRIVER, str(tmp_path / "child.py")]
        started.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True))
        wait_until(lambda: len(list(tmp_path.glob("got-*"))) == 2, "both children are there")
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_nothing_is_started_again(launcher, tmp_path, number):
    process = launcher(leaves=True)
    os.killpg(process.pid, number)  # as a terminal does: to the whole group of the launcher
    assert process.wait(PATIENCE) == 42
    # SIGINT comes as SIGTERM, on which processes agree. Fails when children share the launcher's group: seen
    assert [path.read_text() for path in tmp_path.glob("got-*")] == [str(int(signal.SIGTERM))] * 2
    assert len(pids(tmp_path)) == 2


def test_a_second_signal_kills(launcher, tmp_path):
    process = launcher(leaves=False)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(path.read_text() for path in tmp_path.glob("got-*")), "the signal is passed on")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    assert not any(map(alive, pids(tmp_path)))


def test_nobody_outlives_a_launcher_that_is_killed(launcher, tmp_path):
    # fails without die_with_launcher: seen
    process = launcher(leaves=False)
    process.kill()
    wait_until(lambda: not any(map(alive, pids(tmp_path))), "the children end")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run quickstart --run-dir a/b", "a/b"),
        ("run --run-dir=a/b quickstart", "a/b"),
        ("run quickstart stages.ppo.steps=3 --only ppo", "runs/quickstart"),
        ("run --only ppo quickstart name=other", "runs/other"),
        ("run nowhere.yaml", None),
        ("run", None),
        ("ls", None),
        ("", None),
    ],
)
def test_the_run_directory_that_arguments_mean(words, expected):
    assert run_dir_of(words.split()) == (None if expected is None else Path(expected))
