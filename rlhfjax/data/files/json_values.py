"""JSON, strictly: one value per line, or values of any shape from a stream, in the memory of one of them.

A value that can be read to its end but is no JSON of ours (a key twice, NaN, 1e999) is given as the DataError to raise
about it, so that whoever reads can go on and count.
"""

import codecs
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhfjax.data.files import opening
from rlhfjax.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 18
_SPACE = " \t\n\r"


class StrictDecoder:
    """Decodes JSON; `problem` says what was wrong with the last value although it could be read to its end."""

    def __init__(self) -> None:
        self.problem = ""
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._number
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends. Raises ValueError and RecursionError as json does."""
        self.problem = ""
        return self._json.raw_decode(text, start)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.problem = self.problem or f"{twice[:40]!r} twice in one object; keep the one that is meant"
        return made

    def _constant(self, name: str) -> float:
        self.problem = self.problem or f"{name}, which is no JSON number; write null or leave the field out"
        return 0.0

    def _number(self, digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            self.problem = self.problem or f"{digits[:20]}, which is beyond a float; write it as a string"
        return number


def read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """One value per line: (file:line, value), or the DataError for a line that is none; blank lines are skipped."""
    yield from _values(byte_lines(file, path))


def read_lines_between(file: BinaryIO, path: Path, start: int, end: int, before: int = 0) -> Iterator[tuple[str, Any]]:
    """The same of the lines that begin in the bytes start … end, of which the first is line `before` + 1."""
    if start:
        file.seek(start - 1)
        while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
            start += len(rest)
        start += len(rest) - 1
    yield from _values(byte_lines(file, path, start, end, before))


def _values(lines: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, Any]]:
    decoder = StrictDecoder()
    for where, line in lines:
        if line.strip():
            yield where, _decoded(decoder, line, where)


def byte_lines(
    file: BinaryIO, path: Path, at: int = 0, end: float = math.inf, number: int = 0
) -> Iterator[tuple[str, bytes]]:
    """(file:line, line with its end), without a byte-order mark. Raises DataError for a line of more than 16 MiB.

    The file stands at byte `at`, after `number` lines; no line begins at or after byte `end`.
    """
    most = opening.MAX_ROW_BYTES
    while at < end and (line := file.readline(most + 1)):
        number += 1
        where = f"{path}:{number}"
        if len(line) > most:
            raise DataError(
                f"{where}: expected lines of at most {most >> 20} MiB, got a longer one; "
                "write one object per line, and split long documents"
            )
        yield where, line.removeprefix(BYTE_ORDER_MARK) if at == 0 else line
        at += len(line)


def text_of(line: bytes, where: str) -> str:
    """A line as text. Raises DataError with the first byte that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        raise DataError(f"{where}: expected UTF-8 text, got {got}; save the file as UTF-8") from None


def _decoded(decoder: StrictDecoder, line: bytes, where: str) -> Any:
    try:
        text = text_of(line, where).strip(_SPACE)
        value, end = decoder.decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except DataError as error:
        return error
    except RecursionError:
        return DataError(f"{where}: expected an object with a few levels, got one nested too deep to read")
    except ValueError as error:
        whole = line.endswith(b"\n")
        remedy = "write one JSON object a line" if whole else "if the last line is cut off, write it again"
        return DataError(f"{where}: expected JSON, got {_reason(error)}; {remedy}")
    return DataError(f"{where}: expected JSON, got {decoder.problem}") if decoder.problem else value


def _reason(error: ValueError, column: int = 0) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.removesuffix(' at')} at column {column or error.colno}"


def read_values(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of an array, or values one after the other: (file:line of its beginning, value or DataError).

    Raises DataError where the text is no JSON: what comes after such a place cannot be told apart.
    """
    text = _Text(file, path)
    if not text.skip("["):
        while text.peek():
            yield text.value()
        return
    if text.skip("]"):
        return
    while True:
        where, value = text.value()
        yield where, value
        if text.skip("]"):
            break
        if not text.skip(","):
            got = "something else" if text.peek() else "the end of the file: it is cut off"
            raise DataError(f"{text.where}: expected , or ] after the value that begins at {where}, got {got}")
    if text.peek():
        raise DataError(f"{text.where}: expected the end of the file after the array, got more; one array per file")


class _Text:
    """A window on the text of a file, which moves forward as values are taken."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self._line = file, path, 1
        self._window, self._at, self._ended = "", 0, False
        self._left = 0  # of the window, on its first line: what was there and is taken
        self._utf8, self._decoder = codecs.getincrementaldecoder("utf-8-sig")(), StrictDecoder()

    @property
    def where(self) -> str:
        return f"{self._path}:{self._line}"

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            begin, size = self._at, len(self._window)
            while self._at < size and self._window[self._at] in _SPACE:
                self._at += 1
            self._line += self._window.count("\n", begin, self._at)
            if self._at < size:
                return self._window[self._at]
            if self._ended:
                return ""
            self._more()

    def skip(self, character: str) -> bool:
        """Goes past the next character if it is this one."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> tuple[str, Any]:
        """The next value and where it begins."""
        self.peek()
        where = self.where
        while True:
            try:
                value, end = self._decoder.decode(self._window, self._at)
            except RecursionError:
                raise DataError(f"{where}: expected an object with a few levels, got one nested too deep") from None
            except ValueError as error:
                if self._ended:
                    raise self._wrong(error) from None
            else:
                if end < len(self._window) or self._ended:
                    self._line += self._window.count("\n", self._at, end)
                    self._at = end
                    problem = self._decoder.problem
                    return where, DataError(f"{where}: expected JSON, got {problem}") if problem else value
            if len(self._window) - self._at > opening.MAX_ROW_BYTES:
                most = opening.MAX_ROW_BYTES >> 20
                raise DataError(
                    f"{where}: expected JSON values of at most {most} MiB each, got a longer one or no JSON; look there"
                )
            self._more()

    def _wrong(self, error: ValueError) -> DataError:
        place = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        line = self._line + self._window.count("\n", self._at, place)
        begin = self._window.rfind("\n", 0, place)
        column = place - begin + (self._left if begin < 0 else 0)
        return DataError(f"{self._path}:{line}: expected JSON, got {_reason(error, column)}; correct it there")

    def _more(self) -> None:
        left, begin = self._window[self._at :], self._window.rfind("\n", 0, self._at)
        self._left = self._at + self._left if begin < 0 else self._at - begin - 1
        chunk = self._file.read(max(_CHUNK, len(left)))
        try:
            self._window, self._at = left + self._utf8.decode(chunk, final=not chunk), 0
        except UnicodeDecodeError as error:
            line = self._line + left.count("\n") + error.object[: error.start].count(b"\n")
            raise DataError(
                f"{self._path}:{line}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}; "
                "save the file as UTF-8"
            ) from None
        self._ended = not chunk
