"""Requests to stop: when they are met, and what a wait does with them."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.config.upkeep import Deadlines
from rlhfjax.errors import Stopped
from rlhfjax.host import stopping
from rlhfjax.training import supervision
from rlhfjax.training.supervision import Watch


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture
def said():
    """What was said to people while requests are honoured."""
    lines = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with stopping.honoured(lines.append):
        yield lines
    signal.signal(signal.SIGINT, before)


def test_outside_a_loop_it_is_met_at_once(said):
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        send()
    assert said == []


def test_a_loop_is_told_and_meets_it_itself(said):
    asked = []

    def loop():
        with stopping.held():
            asked.append(stopping.asked())
            send()
            asked.append(stopping.asked())  # and it goes on to its end

    with pytest.raises(Stopped):
        loop()
    assert asked == [False, True]
    assert said == ["SIGTERM: stopping as soon as all is saved; once more stops at once"]


def test_the_keyboard_stops_as_the_keyboard(said):
    with pytest.raises(KeyboardInterrupt), stopping.held():
        send(signal.SIGINT)


def test_handlers_are_as_before():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping.honoured(print):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_wait_is_broken_off(said):
    @jax.jit
    def long(x):
        return jax.lax.fori_loop(0, 2_000, lambda i, y: jnp.tanh(y @ x), x)

    started = long(jnp.eye(256))

    def loop():
        with stopping.held():
            send()
            Watch().wait(started)

    with pytest.raises(Stopped):
        loop()
    # fails when wait asks only after the values are there: seen
    assert not started.is_ready()
    started.block_until_ready()


def test_several_processes_ask_each_other(said):
    answers = iter([False, False, True])
    watch = Watch(agree=lambda: next(answers))
    with stopping.held():
        assert watch.wait(jnp.ones(2)).tolist() == [1.0, 1.0]
        watch.poll()
    with pytest.raises(Stopped, match="by a preemption"):
        watch.wait(jnp.ones(2))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so: a list of one number."""
    now = [100.0]
    monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_longest_unit_counts_for_the_next_request(clock):
    watch = Watch()
    for seconds in (0.3, 0.05, 0.1):  # the first compiles
        for unit, share in (("rollout", 3.0), ("update", 1.0), ("save", 0.5)):
            watch.begin(unit, 1)
            clock[0] += seconds * share
    watch.close()
    assert watch.facts() == {"timing/stop_s": 0.15}  # an update and a save, since a rollout is broken off
    assert Watch().facts() == {}


def test_a_unit_has_the_deadline_of_its_kind_and_compiles_once(monkeypatch, tmp_path):
    # fails when a unit that was seen still has the hours of compiling, and when a save has a step's deadline
    armed = []

    class Dog:
        def __init__(self, stacks):
            armed.append(stacks)

        def arm(self, seconds):
            armed.append(seconds)

        def close(self):
            armed.append("closed")

    monkeypatch.setattr(supervision, "Watchdog", Dog)
    watch = Watch(tmp_path, Deadlines(compile=7.0, step=2.0, save=3.0))
    for step in (1, 2):
        for unit in ("rollout", "update", "save"):
            watch.begin(unit, step)
    watch.close()
    assert armed == [tmp_path / "stacks.txt", 7.0, 7.0, 3.0, 2.0, 2.0, 3.0, "closed"]


STUCK = """
import ctypes, os, signal
from rlhfjax.host import stopping
stopping.PATIENCE = 0.2
with stopping.honoured(print):
    stopping.before_exit(lambda code: print("left with", code, flush=True))
    HOLD
"""
# libc's system() ignores neither signal's handler, but does not return to Python either: here, while there is a file
INSIDE = "ctypes.CDLL(None).system(b'touch inside; while [ -e inside ]; do sleep 0.1; done > /dev/null')"


@pytest.mark.parametrize(
    ("hold", "code", "words"),
    [
        (INSIDE, 42, "left with 42\n"),
        (f"with stopping.held(): {INSIDE}; print('saved', flush=True)", 1, "saved\n"),
    ],
)
def test_inside_a_library(tmp_path, hold, code, words):
    inside = tmp_path / "inside"
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.replace("HOLD", hold)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    until = time.monotonic() + 300
    while not inside.exists():
        assert time.monotonic() < until, "waited 300 s for the process to be inside the library"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    if code == 42:
        process.wait(timeout=300)
    else:
        time.sleep(1.0)  # longer than patience, which does not count while it saves
    inside.unlink()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code  # 1: Stopped, which nobody caught
    assert out.endswith(words)


def test_a_request_does_not_wait_for_what_the_host_does(said):
    """Rewards that never come; several processes have to wait for them together, and return at once."""
    asked = []

    def never():
        if len(asked) == 3:
            send()
        asked.append(1)
        return False

    with pytest.raises(Stopped), stopping.held():
        Watch().until(never)
    assert len(asked) >= 4
    Watch(agree=lambda: False).until(never)
