"""One launch a run directory: who holds it is named, and a holder that dies leaves it free."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.runs.lock import LOCK, run_lock

HOLD = """
import sys, time
from pathlib import Path
from rlhfjax.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "run"`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_told_who_holds_it(holder, tmp_path):
    with pytest.raises(ConfigError) as caught, run_lock(tmp_path / "run"):
        pass
    assert caught.value.exit_code == 2
    since = json.loads((tmp_path / "run" / LOCK).read_text())["since"]
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is in use by process {holder.pid} on {platform.node()} since {since}; wait for it, or "
        "give another --run-dir"
    )
    assert oct((tmp_path / "run" / LOCK).stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "ended"])
def test_it_is_free_when_its_holder_is_gone(holder, tmp_path, end):
    holder.send_signal(end) if end else holder.stdin.close()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists() == bool(end)  # what a killed one leaves is no obstacle
    with run_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_file_that_is_removed_while_it_is_waited_for_is_not_the_lock(tmp_path, monkeypatch):
    # fails when the file that was opened is not compared with the one that is there: seen (two holders at once)
    import fcntl

    taken, flock = [], fcntl.flock

    def removed_before(file, how):
        if not taken:
            taken.append(file)
            (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with run_lock(tmp_path), pytest.raises(ConfigError, match="is in use by process"), run_lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = []
    with run_lock(tmp_path, said.append):
        pass
    assert said == [f"{tmp_path}: its file system has no locks; take care that nothing else runs there"]


def test_two_launches_on_one_run(config, holder, command, tmp_path):
    # case 34 of the faults: refused at once, before jax is started and anything of the run is touched
    code, _, err = command("run", config, "--run-dir", tmp_path / "run")
    assert code == 2
    assert f"is in use by process {holder.pid} on " in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
