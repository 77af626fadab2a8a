"""The audit log: what was flagged and what became of it, without a word of what was said."""

import fcntl
import hashlib
import json
import os
import threading
import time
from pathlib import Path

from rlhfjax.errors import DataError
from rlhfjax.moderation.verdicts import Verdict


class Audit:
    """Appends a line of JSON for each verdict to a file that its owner alone reads; several processes may share it.

    The hash is SHA-256 of the text in UTF-8: equal texts have equal ones, and whoever guesses a text can check it.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()

    def __call__(self, text: str, verdict: Verdict) -> None:
        """Note a verdict. Raises DataError where the file does not take the whole line, of which then nothing stays."""
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "side": verdict.side,
            "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "category": verdict.category,
            "score": round(verdict.scores[verdict.category], 6) if verdict.category else None,
            "action": verdict.action,
        } | ({"failed": verdict.failed} if verdict.failed else {})
        try:
            with self._lock:
                self._append((json.dumps(row) + "\n").encode())
        except OSError as error:
            raise DataError(
                f"{self._path}: the audit log cannot be written: {error.strerror or error}; make room, or correct "
                "`audit` of the policy"
            ) from None

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError("no room for a line")
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
