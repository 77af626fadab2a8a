"""Hosts: which processes are lost together, and whether each can write to its disk."""

import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlhfjax.errors import ConfigError


def shift_of(hosts: Sequence[str]) -> int:
    """By how many places the process that keeps a copy follows the one that it is of: another host's, if there is one.

    0 for a process by itself.
    """
    count = len(hosts)
    shifts = range(1, count)
    apart = (shift for shift in shifts if all(hosts[i] != hosts[(i + shift) % count] for i in range(count)))
    return next(apart, min(1, count - 1))


def require_local_dir(directory: str) -> None:
    """Raises ConfigError where this process cannot write there."""
    place = Path(os.path.abspath(directory))
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=place))
    except OSError as error:
        raise ConfigError(
            f"checkpoints.local.dir: expected a directory that {socket.gethostname()} can write to, got {place}: "
            f"{error.strerror}; name one on a disk of each host, or leave it out"
        ) from None


def this_host() -> str:
    """This machine: processes with the same one are lost together."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
