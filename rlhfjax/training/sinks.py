"""Files that records are appended to while a stage trains. A full disk stops no training and tears no record."""

import os
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# These modules fill themselves when they are imported.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

Report = Callable[[str], None]


def to_stderr(text: str) -> None:
    """One line of progress or trouble."""
    print(text, file=sys.stderr, flush=True)


class Sink:
    """Appends whole records to a file, each handed to the system at once, so that a killed process loses none.

    A record that cannot be written waits in memory, is tried again before the next one and at `close`, and is in the
    file at its place as soon as there is room. `report` is told when that begins, when it ends, and what was lost.
    """

    def __init__(self, path: Path, report: Report = to_stderr):
        self._path, self._report = path, report
        self._file: int | None = _opened(path)  # an error of opening is raised: there is no run to lose yet
        self._size = os.fstat(self._file).st_size  # bytes of whole records
        self._waiting: list[bytes] = []

    def append(self, record: bytes) -> None:
        """Add one record."""
        self._waiting.append(record)
        self.flush()

    def flush(self) -> int:
        """Try to write what waits; how many records still wait."""
        late = len(self._waiting) > 1
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            self._cut_back()
            if not late:
                self._report(f"{self._path} cannot be written: {error.strerror}; its rows are kept and tried again")
            return len(self._waiting)
        if late:
            self._report(f"{self._path} can be written again; no row is missing")
        return 0

    def close(self) -> None:
        """Try a last time, and say what is lost."""
        if lost := self.flush():
            self._report(f"{self._path}: the last {lost} rows could not be written and are lost")
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, record: bytes) -> None:
        if self._file is None:
            self._file = _opened(self._path)
            self._size = min(self._size, os.fstat(self._file).st_size)
            os.ftruncate(self._file, self._size)
        left = memoryview(record)
        while left:
            left = left[os.write(self._file, left) :]
        self._size += len(record)

    def _cut_back(self) -> None:
        """Remove the part of a record that was written; the file is opened anew for the next try."""
        if self._file is None:
            return
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            pass  # tried again before the next record
        finally:
            os.close(self._file)
            self._file = None


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


class Board:
    """Scalars for TensorBoard: an event file with one event per step.

    A run that continues hides what an earlier event file holds after `start_step`.
    """

    def __init__(self, directory: Path, start_step: int, report: Report = to_stderr):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{os.uname().nodename}.{os.getpid()}"
        self._sink, first = Sink(directory / name, report), start_step + 1
        self._sink.append(_framed(Event(wall_time=time.time(), step=first, file_version="brain.Event:2")))
        begin = SessionLog(status=SessionLog.START)
        self._sink.append(_framed(Event(wall_time=time.time(), step=first, session_log=begin)))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """The scalars of one step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._sink.append(_framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))

    def close(self) -> None:
        self._sink.close()


def _framed(event: Event) -> bytes:
    """A record of an event file: its length and its bytes, each with a masked CRC-32C."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
