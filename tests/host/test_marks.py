"""A mark says where the main thread stands, and a ledger of time what it was doing in between."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from rlhfjax.host import marks
from rlhfjax.host.goodput import FAILURE, PRODUCTIVE, account_of

KILLED = """
import os, sys, time
from pathlib import Path
from rlhfjax.host import marks, time_ledger

with time_ledger.kept(Path(sys.argv[1]), True):
    marks.stage("sft")
    marks.done(int(sys.argv[2]))
    for step in range(int(sys.argv[2]) + 1, 6):
        marks.unit("sft", step)
        with marks.inside(marks.DATA):
            time.sleep(0.01)
        with marks.inside(marks.PROGRAM):
            time.sleep(0.02)
        marks.done(step)
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setattr(marks, "_mark", marks.Mark())
    monkeypatch.setattr(marks, "_listeners", [])


def test_a_place_grows_as_processes_go_on_together():
    places = [marks.here().place]

    def passed():
        places.append(marks.here().place)

    for step in (1, 2):
        marks.unit("update", step, 9.0)
        passed()
        with marks.inside(marks.DATA):
            pass
        with marks.inside(marks.PROGRAM):
            passed()
        with marks.inside(marks.PROCESSES, "saved"):
            passed()
        marks.met()
        passed()
    assert places == sorted(set(places))


def test_a_region_ends_where_it_began_and_other_threads_move_nothing():
    told = []
    stop = marks.listen(lambda mark: told.append(mark.region))
    marks.unit("sft", 3)
    with pytest.raises(KeyError), marks.inside(marks.COMPILING), marks.inside(marks.PROCESSES):
        raise KeyError
    thread = threading.Thread(target=lambda: marks.unit("other", 9))
    thread.start()
    thread.join()
    assert list(marks.followed(marks.DATA, "ab")) == ["a", "b"]
    assert (marks.here().unit, marks.here().region) == ("sft", marks.WORKING)
    w = marks.WORKING
    assert told == [w, marks.COMPILING, marks.PROCESSES, marks.COMPILING, w, *[marks.DATA, w] * 3]
    stop()
    marks.done(3)
    assert len(told) == 11


def test_a_killed_process_leaves_what_it_did(tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *words], check=False).returncode

    assert [run("0", "kill"), run("3", "end")] == [-signal.SIGKILL, 0]
    account = account_of(tmp_path)
    assert account.steps == {PRODUCTIVE: 5, "lost to preemption": 0, FAILURE: 2}
    assert [attempt.code for attempt in account.attempts] == [None, 0]
    assert account.seconds[PRODUCTIVE] >= 5 * 0.02
    assert account.seconds["waiting"] >= 7 * 0.01
    assert account.seconds[FAILURE] > 2 * 0.02  # steps 4 and 5 again, and the pause
    assert os.stat(tmp_path / "time.jsonl").st_mode & 0o077 == 0
