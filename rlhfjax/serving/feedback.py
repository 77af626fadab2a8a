"""Votes of people as records that a recipe reads: whole lines, each on the disk before it is acknowledged."""

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError

COMPARISONS, THUMBS = "comparisons.jsonl", "thumbs.jsonl"
_KEPT = 0o600


class Feedback:
    """A directory with `comparisons.jsonl` (comparison records) and `thumbs.jsonl` (unpaired records).

    A vote has an id that its sender chose: one that is sent again is kept once. Nothing of who sent it is in a record.
    """

    def __init__(self, directory: Path):
        """Open or make it; what a killed server left of a line, which it had not acknowledged, goes.

        Raises ConfigError where it cannot be written.
        """
        self.directory = directory
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._known = {name: _ids(directory / name) for name in (COMPARISONS, THUMBS)}
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"a line that is no record ({error})"
            raise ConfigError(f"{directory}: expected a directory for votes, got {reason}; choose another") from None

    def keep(self, name: str, key: str, record: Mapping[str, Any]) -> bool:
        """Append a record; False where its id is there already. Raises OSError where the disk does not take it."""
        line = json.dumps({"id": key, **record}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if key in self._known[name]:
                return False
            _append(self.directory / name, line)
            self._known[name].add(key)
        return True


def _append(path: Path, line: bytes) -> None:
    """The whole line, or nothing."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _KEPT)
    try:
        end = os.fstat(opened).st_size
        try:
            if os.write(opened, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(opened)
        except OSError:
            os.ftruncate(opened, end)
            raise
    finally:
        os.close(opened)


def _ids(path: Path) -> set[str]:
    """Those of the whole lines of a file, from which what follows the last of them is cut."""
    if not path.exists():
        return set()
    with path.open("r+b") as file:
        found, end = set(), 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            found.add(str(json.loads(line).get("id", "")))
            end += len(line)
        file.truncate(end)
    return found
