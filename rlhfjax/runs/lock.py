"""One run directory, one launch: a lock that the system takes back by itself when its holder dies."""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what file systems without locks say


@contextmanager
def run_lock(run_dir: Path, report: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold RUN/.lock, an advisory lock (flock) of this process.

    A holder that is killed, even by SIGKILL, holds it no longer, and the file that it leaves is no obstacle. Raises
    ConfigError that names process, machine and time where another launch holds it. A file system without locks is
    reported, and the run goes on without one.
    """
    path = run_dir / LOCK
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _locked(path)
    except BlockingIOError:
        raise ConfigError(f"{run_dir} is in use by {_holder(path)}; wait for it, or give another --run-dir") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}; give another --run-dir") from None
        report(f"{run_dir}: its file system has no locks; take care that nothing else runs there")
        yield
        return
    try:
        who = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(who).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that nobody else's file is removed
        os.close(file)


def _locked(path: Path) -> int:
    """An open file with the lock, the one that the path names now. Raises BlockingIOError where another has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder removed it between our opening and our locking


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Who holds the lock, as it says itself; it may be about to."""
    try:
        who: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
