"""A forked command against the same one started as anybody would."""

import json
import os
import signal
import subprocess
import sys

import pytest
from forks import server_of

SHOWS = """
import json, os, signal, sys
known = [s for s in signal.valid_signals() if isinstance(s, signal.Signals)]
json.dump({
    "arguments": sys.argv, "as started": sys.orig_argv, "name": __name__, "directory": os.getcwd(), "path": sys.path,
    "variables": dict(os.environ), "process group": os.getpgid(0), "session": os.getsid(0), "umask": os.umask(0o77),
    "signals": {s.name: str(signal.getsignal(s)) for s in known}, "blocked": str(signal.pthread_sigmask(0, [])),
    "threads": len(os.listdir("/proc/self/task")), "files": sorted(os.listdir("/proc/self/fd")),
    "flags": str(sys.flags),
    "input": os.readlink("/proc/self/fd/0"), "encoding": sys.stdout.encoding, "lines": sys.stdout.line_buffering,
}, sys.stdout)
"""
ENDS = """
import atexit, os, signal, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("of a thread"))).start()
print("begun", file=sys.stderr)
if sys.argv[1] == "raises":
    raise KeyError("a word")
elif sys.argv[1] == "calls":
    os._exit(9)
elif sys.argv[1].isdigit():
    sys.exit(int(sys.argv[1]))
else:
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(100)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")


@pytest.fixture
def both(environment, tmp_path, monkeypatch):
    """What a program says and how it ends: forked, and started."""
    server = server_of(environment)  # which may begin here, in another directory
    monkeypatch.chdir(tmp_path)
    variables = environment | {"RLHFJAX_DATA_DIR": "a place"}

    def ran(program, *args):
        (tmp_path / "shows.py").write_text(program, encoding="utf-8")
        forked = server.start("shows", *args, environment=variables)
        words = [sys.executable, "-m", "shows", *args]
        # Where the tests run in the background, a shell has it ignored, and what they start inherits that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        started = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        signal.signal(signal.SIGINT, before)
        return (*forked.communicate(), forked.returncode), (started.stdout, started.stderr, started.returncode)

    return ran


def test_it_finds_what_a_process_finds(both):
    (one, *_), (other, *_) = both(SHOWS, "run", "two words")
    one, other = json.loads(one), json.loads(other)
    assert one == other
    assert one["variables"]["RLHFJAX_DATA_DIR"] == "a place"


@pytest.mark.parametrize("end", ["0", "3", "calls", "SIGKILL", "SIGTERM", "SIGINT"])
def test_it_ends_as_a_process_does(both, end):
    one, other = both(ENDS, end)
    assert one[0::2] == other[0::2]
    assert ("begun\n" in one[1]) == ("begun\n" in other[1])


def test_its_errors_are_those_of_a_process(both):
    one, other = both(ENDS, "raises")
    assert one[0::2] == other[0::2]
    assert one[1].splitlines()[-1] == other[1].splitlines()[-1] == "KeyError: 'a word'"


def test_it_is_waited_for_and_killed_as_a_process_is(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waits.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(1e6)\n", encoding="utf-8")
    with server_of(environment).start("waits", environment=environment) as process:
        assert process.stdout.readline() == "begun\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=0.01)
        os.kill(process.pid, 0)
        process.kill()
        assert process.communicate() == ("", "")
    assert process.returncode == process.poll() == -signal.SIGKILL
    process.kill()  # which nobody hears
