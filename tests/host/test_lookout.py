"""Who holds up a run is told from what processes posted of themselves; the line says who, where and since when."""

import os
import platform

import pytest

from rlhfjax.host.lookout import Lookout, Seen, state_of, verdict
from rlhfjax.host.processes import jax_heartbeat

NOW = 1000.0


def seen(units, meetings=0, waits=False, age=5.0, ago=0.5, limit=30.0, **told):
    """What a process posted `ago` seconds before NOW."""
    whole = {
        "place": [units, meetings, waits],
        "age": age,
        "limit": limit,
        "stage": "ppo",
        "step": units,
        "unit": "update",
    }
    whole |= {"region": "host code", "name": "", "frames": "a.py:1 f < b.py:2 g", "stacks": "run/ppo/stacks.txt"}
    return Seen(whole | {"host": "elsewhere", "pid": 7, "devices": "tpu:0 to 3"} | told, NOW - ago)


def test_nothing_is_said_while_all_are_in_time():
    others = {0: seen(12), 1: seen(11, age=29.0, ago=0.9), 2: seen(3, age=9000.0, limit=0.0, ago=400.0)}
    assert verdict(others, NOW, 24.0) is None


@pytest.mark.parametrize(
    "last",
    [seen(11, 4, age=20.0), seen(12, 0), seen(12, 1), seen(12, 1, True)],
    ids=["a unit before", "not in the program", "after it", "at another one"],
)
def test_who_is_behind_is_named_and_not_who_waits(last):
    line, who = verdict({0: seen(12, 2, age=31.0), 1: seen(12, 2, age=29.0), 2: last, 3: seen(13)}, NOW, 24.0)
    assert who == [2]
    assert line.startswith(
        "process 2 (elsewhere, tpu:0 to 3, pid 7) is waited for by process 0 at ppo step 12, update: "
    )
    assert f"in ppo step {last.place[0]}, update, host code, for " in line
    assert line.endswith("; at a.py:1 f < b.py:2 g; stacks of its threads: run/ppo/stacks.txt")
    assert "\n" not in line


def test_several_may_be_behind_and_none_may_be():
    line, who = verdict({0: seen(12, age=31.0), 1: seen(11), 2: seen(11), 3: seen(11)}, NOW, 24.0)
    assert (who, line.rpartition("; ")[2]) == ([1, 2, 3], "so is process 2, 3")
    line, who = verdict({index: seen(12, 1, age=31.0) for index in range(4)}, NOW, 24.0)
    assert line.startswith("all 4 processes have been too long in ppo step 12")
    assert who == [0, 1, 2, 3]


def test_one_process_says_where_it_stood():
    line, who = verdict({0: seen(12, age=31.0, region="reading data")}, NOW, 24.0)
    assert who == [0]
    assert (
        " did not come out of ppo step 12, update in 30 s: it is in ppo step 12, update, reading data, for 32 s;"
        in line
    )


def test_silence_comes_first():
    line, who = verdict({0: seen(11, age=31.0), 1: seen(12, ago=25.0)}, NOW, 24.0)
    assert who == [1]
    assert " says nothing since 25 s (stopped, dead or cut off); last it was in ppo step 12, update" in line


def test_between_units_of_work_silence_is_not_enough_but_what_the_system_says_is():
    gone = {"host": platform.node(), "pid": 2**22 + 1}
    assert verdict({0: seen(12), 1: seen(12, limit=0.0, ago=25.0)}, NOW, 24.0) is None
    line, who = verdict({0: seen(12), 1: seen(12, limit=0.0, ago=25.0, **gone)}, NOW, 24.0)
    assert who == [1]
    assert " says nothing since 25 s (gone); " in line


@pytest.mark.parametrize("heartbeat", [3, 10, 30, 600])
def test_jax_ends_nobody_before_the_line_is_said(heartbeat):
    """Who was stopped told jax that it lives once in half of jax's heartbeat, so it is missed after half of it."""
    assert jax_heartbeat(heartbeat) / 2 >= heartbeat + 2
    lookout = Lookout(heartbeat, print, print)
    assert lookout._most_silent + 1.5 * lookout._period < heartbeat


def test_what_the_system_knows_of_a_process():
    assert state_of({"host": platform.node(), "pid": os.getpid()}) == "it lives, and lets none of its threads run"
    assert state_of({"host": platform.node(), "pid": 2**22 + 1}) == "gone"
