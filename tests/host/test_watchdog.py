"""A process whose deadline passes ends with 42 and leaves the stacks of its threads."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from pathlib import Path
from rlhfjax.host.watchdog import Watchdog

begun = threading.Event()

def waits_elsewhere():
    begun.set()
    threading.Event().wait()

threading.Thread(target=waits_elsewhere, daemon=True).start()
begun.wait()
watchdog = Watchdog(Path(sys.argv[1]))
watchdog.arm(9000.0)
WHAT
"""


def ended(folder, what):
    """(exit code, stacks) of a process that does this under a deadline of hours."""
    path = folder / "stacks.txt"
    words = [sys.executable, "-c", PROGRAM.replace("WHAT", what), str(path)]
    code = subprocess.run(words, timeout=300, check=False).returncode
    return code, path.read_text(encoding="utf-8") if path.exists() else None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere faulthandler's thread needs the interpreter's lock")
@pytest.mark.parametrize("hang", ["ctypes.PyDLL(None).sleep(9000)", "ctypes.CDLL(None).sleep(9000)"])
def test_what_hangs_is_ended_also_with_the_lock_of_the_interpreter(tmp_path, hang):
    # a PyDLL keeps the lock while it is in C. Fails with a timer of Python's own: nothing ends the first
    code, stacks = ended(tmp_path, f"watchdog.arm(0.5)\n{hang}")
    assert code == 42
    assert "waits_elsewhere" in stacks
    assert stacks.count("hread 0x") == 2


def test_a_deadline_that_is_closed_ends_nothing_and_leaves_nothing(tmp_path):
    # a file that stays would say that something hung
    assert ended(tmp_path, "watchdog.close()") == (0, None)
