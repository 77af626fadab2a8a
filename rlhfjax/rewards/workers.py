"""Worker processes as the run sees them: started, asked, and killed with all their children when they do not answer."""

import contextlib
import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rlhfjax.rewards.frames import HEAD_BYTES, body_bytes, framed

START_SECONDS = 300.0  # to import what a function needs
_LEAVE_SECONDS = 5.0  # for what a function does at the exit of its process
_LOOK_SECONDS = 0.2  # a worker whose children keep its socket open is seen to be dead within these
_BOOT = """import json, sys
sys.path[:] = json.loads(sys.argv[2])
from rlhfjax.rewards.worker import main
main(int(sys.argv[1]))
"""


class Failed(Exception):
    """A call that gave no numbers; its text says why."""


class Worker:
    """One process, which is the leader of a group of its own; `spec` is what it loads. It must be closed or killed."""

    def __init__(self, spec: Mapping[str, Any]):
        self._socket, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: that imports the run's main module, and pickles.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | spec.get("environment", {}),
            )
        self._socket.setblocking(False)
        self._ending = threading.RLock()
        self._message = {name: value for name, value in spec.items() if name != "environment"}

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self) -> None:
        """Load what was named. Raises Failed."""
        answer = self.ask(self._message, START_SECONDS)
        if "error" in answer:
            raise Failed(answer["error"])

    def ask(self, message: Any, seconds: float) -> dict[str, Any]:
        """The answer to a message. Raises Failed where none comes in `seconds`, or the process ends."""
        unsent, got = memoryview(framed(message)), bytearray()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while len(got) < HEAD_BYTES or len(got) < HEAD_BYTES + body_bytes(bytes(got[:HEAD_BYTES])):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Failed(f"no answer within {seconds:g} s; its process was killed")
                ready = selector.select(min(left, _LOOK_SECONDS))
                events = ready[0][1] if ready else 0
                try:
                    if events & selectors.EVENT_WRITE:
                        unsent = unsent[self._socket.send(unsent) :]
                        if not unsent:
                            selector.modify(self._socket, selectors.EVENT_READ)
                    chunk = self._socket.recv(1 << 16) if events & selectors.EVENT_READ else None
                except OSError:
                    chunk = b""
                if chunk == b"" or (chunk is None and not ready and self._has_ended()):
                    raise Failed(f"its process ended with {self._end()}")
                got += chunk or b""
        return json.loads(bytes(got[HEAD_BYTES:]))

    def _has_ended(self) -> bool:
        # Not waited for yet: as long as it is a zombie no other group can get its number.
        with self._ending:
            gone = self._process.returncode is not None
            return gone or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _end(self) -> str:
        self.kill(_LEAVE_SECONDS)
        code = self._process.returncode
        return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"

    def leave(self) -> None:
        """Ask an idle process to end by itself."""
        with contextlib.suppress(OSError):
            self._socket.sendall(framed(None))

    def interrupt(self) -> None:
        """Kill the process and its group, while another thread waits for its answer."""
        with self._ending, contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)

    def kill(self, patience: float = 0.0) -> None:
        """End the process and all of its group, once it has had `patience` seconds to end by itself."""
        deadline = time.monotonic() + patience
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.interrupt()
        with self._ending:
            self._process.wait()
        self._socket.close()


class Pool:
    """Workers that load the same `spec`; each of as many threads asks one of them at a time, for `seconds` at most.

    A worker that failed to answer is killed, and the next call starts another.
    """

    def __init__(self, spec: Mapping[str, Any], workers: int, seconds: float):
        self._spec, self._seconds, self._count = spec, seconds, workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._free: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._free.put(None)
        self._changing, self._all, self._closed = threading.Lock(), set[Worker](), False

    def start(self) -> None:
        """Start every worker and have it load. Raises Failed."""
        for loaded in [self._threads.submit(self._call, None) for _ in range(self._count)]:
            loaded.result()

    def submit(self, examples: list[dict[str, Any]]) -> "Future[dict[str, Any]]":
        """The answer to come for some examples; its result raises Failed."""
        return self._threads.submit(self._call, examples)

    def _call(self, examples: list[dict[str, Any]] | None) -> dict[str, Any]:
        worker = self._free.get()
        try:
            if worker is None:
                worker = self._started()
                worker.load()
            return {} if examples is None else worker.ask(examples, self._seconds)
        except BaseException:
            if worker is not None:
                worker.kill()
                self._all.discard(worker)
                worker = None
            raise
        finally:
            self._free.put(worker)

    def _started(self) -> Worker:
        with self._changing:
            if self._closed:
                raise Failed("the run ends")
            worker = Worker(self._spec)
            self._all.add(worker)
        return worker

    def close(self) -> None:
        """End all workers: idle ones by themselves, if they do so soon; what is under way is given up."""
        with self._changing:
            self._closed = True
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        idle = [worker for worker in idle if worker is not None]
        for worker in idle:
            worker.leave()
        for worker in self._all.difference(idle):
            worker.interrupt()
        for worker in idle:
            worker.kill(_LEAVE_SECONDS)
        for _ in range(self._count):
            self._free.put(None)  # for calls that wait for one, which are told that there is none
        self._threads.shutdown(cancel_futures=True)
