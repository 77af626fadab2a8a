"""A run outlives those who watch it: output that nobody reads any more goes nowhere instead of ending the run."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Lasting:
    """A text stream in the place of another: from the first error on it writes nowhere, and remembers why."""

    def __init__(self, stream: Any):
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: Any) -> None:
        if self.error is not None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except (OSError, ValueError) as error:  # no reader, a terminal that is gone, a full disk; a closed stream
            self.error = error
            with suppress(OSError, ValueError):  # what C++ writes to the descriptor, and Python at exit, goes nowhere
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[Callable[[], dict[str, Any]]]:
    """Inside, output that cannot be written is dropped. Gives a function that says of which stream, and why.

    Python ignores SIGPIPE, so a reader that has ended shows as an error of the write.
    """
    before = sys.stdout, sys.stderr
    streams = {"stdout": _Lasting(sys.stdout), "stderr": _Lasting(sys.stderr)}

    def lost() -> dict[str, Any]:
        errors = {name: str(stream.error) for name, stream in streams.items() if stream.error is not None}
        return {"output_lost": errors} if errors else {}

    sys.stdout, sys.stderr = streams["stdout"], streams["stderr"]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield lost
    finally:
        for stream in streams.values():
            stream.flush()
        sys.stdout, sys.stderr = before
