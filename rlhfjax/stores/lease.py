"""Who may write to a run in an object store: a lock of numbered objects, and a lease that its holder renews.

A store has no locks that go with their process. It has one thing that is enough: an object can be created on the
condition that none of its name is there.

- The lock is the object `.lock/N` with the highest number. Whoever wants it creates the one after it; of several that
  try, the store lets one. Numbers only rise, so nobody can come back to one that others have gone past.
- Its holder writes `.lock/N.alive` anew every quarter of the lease. Who finds a lock watches that object for a whole
  lease by its own clock: if it changes, the holder lives; if not, the next number may be taken. Clocks of machines are
  never compared. Where the holder was a process of this machine, the system says whether it lives, at once.
- A holder that could not renew for half a lease asks the store before it writes anything that counts, and ends where
  a higher number is there.
- One that ends says so in its object, which stays as the highest.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.stores.client import Store, Unreachable

SECONDS = 60.0
FOLDER = ".lock"


class Lease:
    """The lock on a store; `number` is its own, `before` that of the holder before (0: none).

    Raises ConfigError where another launch holds it.
    """

    def __init__(self, store: Store, say: Callable[[str], None] = lambda text: None, seconds: float = SECONDS):
        self._store, self._seconds = store, seconds
        self._me = {"owner": uuid.uuid4().hex, "lease": seconds, **_process()}
        self.before = self.number = 0
        self._taken(say)
        self._renewed, self._lost = time.monotonic(), False
        self._ended, self._turn = threading.Event(), threading.Lock()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    def require(self) -> None:
        """Raises ConfigError where somebody else has taken the lock by now; asks the store when in doubt."""
        if not self._lost and time.monotonic() - self._renewed > self._seconds / 2:
            self._beat()
        if self._lost:
            raise ConfigError(
                f"{self._store.url}: this launch could not renew its lock for {self._seconds:.0f} s and another one "
                "has taken it; nothing more is written from here"
            )

    def release(self) -> None:
        """Say that nobody holds it."""
        self._ended.set()
        self._renewing.join()
        if not self._lost:
            self._store.write(_key(self.number), json.dumps(self._me | {"released": True}).encode())
            self._store.delete([f"{_key(self.number)}.alive"])

    def _taken(self, say: Callable[[str], None]) -> None:
        while True:
            last = _highest(self._store)
            holder = _read(self._store, last) if last else {"released": True}
            if holder is None:
                continue  # whoever has the next number deleted it
            if not holder.get("released") and not _ended_here(holder):
                self._watch(last, holder, say)
            if not self._store.create(_key(last + 1), json.dumps(self._me).encode()):
                continue
            self.before, self.number = last, last + 1
            if _highest(self._store) == self.number:  # or this one was long past when it was created
                break
            self._store.delete([_key(self.number)])
        self._store.delete(key for key in self._store.sizes(FOLDER) if _number(key) < self.number)

    def _watch(self, number: int, holder: dict[str, Any], say: Callable[[str], None]) -> None:
        """Return when a whole lease has passed without a sign of the holder. Raises ConfigError at the first sign."""
        used = ConfigError(
            f"{self._store.url} is in use by process {holder.get('pid')} on {holder.get('host')} since "
            f"{holder.get('since')}; wait for it, or give another --run-dir"
        )
        if _same_machine(holder):
            raise used
        lease = float(holder.get("lease", SECONDS))
        say(
            f"{self._store.url}: process {holder.get('pid')} on {holder.get('host')} had it last; waiting for up to "
            f"{lease:.0f} s for a sign of it"
        )
        until, first = time.monotonic() + lease, _read(self._store, number, ".alive")
        while time.monotonic() < until:
            time.sleep(min(2.0, lease / 8))
            now = _read(self._store, number)
            if now is None or now.get("released") or _highest(self._store) != number:
                return
            if _read(self._store, number, ".alive") != first:
                raise used

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / 4):
            try:
                self._beat()
            except OSError:  # what is to be written now asks for itself
                continue

    def _beat(self) -> None:
        with self._turn:
            began = time.monotonic()
            if _highest(self._store) != self.number:
                self._lost = True
                return
            beat = {"owner": self._me["owner"], "beat": uuid.uuid4().hex}
            self._store.write(f"{_key(self.number)}.alive", json.dumps(beat).encode())
            self._renewed = began


def _key(number: int) -> str:
    return f"{FOLDER}/{number:08d}"


def _number(key: str) -> int:
    text = key.rpartition("/")[2].removesuffix(".alive")
    return int(text) if text.isdigit() else 0


def _highest(store: Store) -> int:
    return max((_number(key) for key in store.sizes(FOLDER) if not key.endswith(".alive")), default=0)


def _read(store: Store, number: int, ending: str = "") -> dict[str, Any] | None:
    """The object of a number; None where it is gone. One that nobody can read says nothing of its holder."""
    try:
        found = json.loads(store.read(f"{_key(number)}{ending}"))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except Unreachable:
        raise
    except ValueError:
        return {}


def _process() -> dict[str, Any]:
    """This process, as only it can be called: machine, boot, space of process numbers, number and when it began."""
    return {
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "machine": _machine(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no such files off Linux: then only the lease counts
        return None


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None where there is none (a dead one that waits to be reaped)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _same_machine(holder: dict[str, Any]) -> bool:
    return holder.get("machine") is not None and holder["machine"] == _machine()


def _ended_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    pid = holder.get("pid")
    return _same_machine(holder) and isinstance(pid, int) and _began(pid) != holder.get("began")
