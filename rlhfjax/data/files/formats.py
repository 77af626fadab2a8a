"""Formats of files, recognised by the first bytes and then the suffix, and their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfjax.data.files import opening
from rlhfjax.data.files.json_values import BYTE_ORDER_MARK, StrictDecoder, read_lines, read_lines_between, read_values
from rlhfjax.data.files.plain_text import read_text
from rlhfjax.data.files.tables import delimiter_of, read_csv, read_parquet
from rlhfjax.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".text", ".md")
_PARQUET = b"PAR1"
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet); unpack it, or save it as CSV",
    b"BZh": "a bzip2 file; unpack it",
    b"\xfd7zXZ": "an xz file; unpack it",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; save it as Parquet",
    b"SQLite format 3": "an SQLite database; save the table as CSV",
    b"%PDF": "a PDF; save its text",
    b"\x89HDF": "an HDF5 file; save it as Parquet",
    b"\x80\x04\x95": "a pickle, which is not opened; save it as JSONL",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; run git lfs pull",
}
_HEAD = 1 << 16


@dataclass(frozen=True)
class FileFormat:
    """The kind of a file's rows (`lines`, `json`, `csv`, `text` or `parquet`), and how it is compressed, if it is."""

    rows: str
    compression: str = ""
    delimiter: str = ","

    def __str__(self) -> str:
        name = {"lines": "JSON lines", "json": "JSON", "csv": "CSV", "text": "plain text", "parquet": "Parquet"}[
            self.rows
        ]
        name = "TSV" if (self.rows, self.delimiter) == ("csv", "\t") else name
        return f"{name}, {self.compression}" if self.compression else name


def format_of(path: Path) -> FileFormat:
    """What a file is. Raises DataError, naming what it found, for a file that holds no rows which are read here."""
    with opening.open_bytes(path) as (file, compression):
        head = file.read(_HEAD)
    suffix = Path(opening.without_compression(path.name)).suffix.lower()
    for magic, found in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{path}: expected JSON, JSON lines, CSV, TSV, Parquet or text, got {found}")
    if head.startswith(_PARQUET):
        if compression:
            raise DataError(f"{path}: expected Parquet as it is, got it inside {compression}; unpack it")
        return FileFormat("parquet")
    if suffix == ".parquet":
        raise DataError(f"{path}: expected Parquet, got a file that does not begin with PAR1; copy or write it again")
    return FileFormat(*_of_text(path, suffix, head, compression))


def _of_text(path: Path, suffix: str, head: bytes, compression: str) -> tuple[str, str, str]:
    begin = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    first = begin.split(b"\n", 1)[0]
    if suffix in (".jsonl", ".ndjson"):
        return ("json" if begin[:1] == b"[" else "lines"), compression, ""
    if begin[:1] == b"{" and _is_object(first):
        return "lines", compression, ""
    if suffix == ".json" or (suffix not in SUFFIXES and begin[:1] in (b"{", b"[")):
        return "json", compression, ""
    if suffix in (".csv", ".tsv"):
        header = first.decode("utf-8", "replace")
        return "csv", compression, "\t" if suffix == ".tsv" else delimiter_of(header)
    if suffix in SUFFIXES or (not suffix and b"\0" not in head):
        return "text", compression, ""
    what = "binary data" if b"\0" in head else f"{suffix or 'no suffix'}"
    raise DataError(
        f"{path}: expected a file that ends in {', '.join(SUFFIXES)} (also .gz, .zst), got {what}; rename it"
    )


def _is_object(line: bytes) -> bool:
    try:
        value, end = StrictDecoder().decode(line.decode("utf-8").rstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and end > 0


def rows_of(path: Path, found: FileFormat, sample_by: str = "paragraph") -> Iterator[tuple[str, Any]]:
    """(place, object) of every row, with the DataError in place of a row that is wrong but has an end.

    Raises DataError where nothing after a place can be read, or the file itself can't be.
    """
    if found.rows == "parquet":
        opening.require_file(path)
        yield from read_parquet(path)
        return
    with opening.open_bytes(path) as (file, _):
        if found.rows == "lines":
            yield from read_lines(file, path)
        elif found.rows == "json":
            yield from read_values(file, path)
        elif found.rows == "csv":
            yield from read_csv(file, path, found.delimiter)
        else:
            yield from read_text(file, path, sample_by)


def rows_between(path: Path, start: int, end: int, before: int = 0) -> Iterator[tuple[str, Any]]:
    """`rows_of` of JSON lines that are not compressed, for those that begin in the bytes start … end.

    The first of them is line `before` + 1.
    """
    opening.require_file(path)
    with opening.readable(path), path.open("rb") as file:
        yield from read_lines_between(file, path, start, end, before)


def read_objects(path: str | Path, sample_by: str = "paragraph") -> Iterator[tuple[str, Any]]:
    """(file:line or file:row N, decoded object) of every row, in the memory of one row where the format allows it.

    Raises DataError for the first row that is wrong, and for a file that can't be read.
    """
    path = Path(path)
    for where, obj in rows_of(path, format_of(path), sample_by):
        if isinstance(obj, DataError):
            raise obj
        yield where, obj
