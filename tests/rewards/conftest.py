"""Rewards opened for a test from what a configuration would say, and waiting for what processes do."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhfjax.config.rewards import Rewards as Section
from rlhfjax.config.sections import Section as Base
from rlhfjax.rewards import Example, Rewards

PATIENCE = 120.0  # seconds for what takes milliseconds on a machine with nothing else to do
EXAMPLES = [
    Example(f"{i} + 1 =", f" {i + 1}", (9, i), (i,) * (i + 1), i % 2 == 0, {"answer": str(i + 1)}) for i in range(6)
]


class Stage(Base):
    rewards: Section


def terms_of(*entries):
    return Stage.model_validate({"rewards": list(entries)}).rewards


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`opened(entry, …)` in a directory of its own; `said` of what it gives is what was reported."""
    monkeypatch.chdir(tmp_path)

    @contextmanager
    def use(*entries):
        said = []
        with Rewards.open(terms_of(*entries), said.append) as rewards:
            rewards.said = said
            yield rewards

    return use


def wait_for(what, condition):
    """Until a condition holds, which nothing here hurries."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.02)


def _fields(stat: Path) -> list[str]:
    try:
        return stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0"]


def state(pid: int) -> str:
    """What the system says that a process does: R runs, S sleeps, Z has ended (and nobody asked for its exit code)."""
    return _fields(Path(f"/proc/{pid}/stat"))[0]


def parent(stat: Path) -> int:
    """The process that one is a child of."""
    return int(_fields(stat)[1])


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    return state(pid) == "Z"


@pytest.fixture
def ends():
    """Process ids that must be gone at the end of the test; whoever is not is killed."""
    pids: list[int] = []
    yield pids
    left = [pid for pid in pids if not gone(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
