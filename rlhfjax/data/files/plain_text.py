"""Plain text as documents: between blank lines, a line each, or a file each."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rlhfjax.data.files import opening
from rlhfjax.data.files.json_values import byte_lines, text_of
from rlhfjax.errors import DataError


def read_text(file: BinaryIO, path: Path, sample_by: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line where it begins, {"text": …}) of each document that is more than white space; line ends become LF.

    `sample_by` is "paragraph" (a blank line ends a document), "line" or "document" (the whole file). Raises DataError
    for a document of more than 16 MiB: none is cut.
    """
    begins, lines, size = "", [], 0
    for where, raw in byte_lines(file, path):
        line = text_of(raw, where).replace("\r\n", "\n").replace("\r", "\n")
        if lines and (sample_by == "line" or (sample_by == "paragraph" and not line.strip())):
            yield begins, {"text": _joined(lines)}
            lines, size = [], 0
        if not lines and not line.strip():
            continue
        begins, size = begins if lines else where, size + len(line)
        lines.append(line)
        if size > opening.MAX_ROW_BYTES:
            raise DataError(
                f"{begins}: expected documents of at most {opening.MAX_ROW_BYTES >> 20} MiB, got a longer one; put "
                "blank lines between documents, or read it with sample_by: line"
            )
    if lines:
        yield begins, {"text": _joined(lines)}


def _joined(lines: list[str]) -> str:
    return "".join(lines).rstrip("\n")
