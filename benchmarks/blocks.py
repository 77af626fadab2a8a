"""Blocks of a document that are written by a command, each between two markers with its name."""

from pathlib import Path

from rlhfjax.errors import DataError


def with_block(text: str, name: str, block: str) -> str:
    """The text with the block between the markers of its name.

    Raises DataError unless each marker is there once, in their order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DataError(f"expected {begin} and then {end}, once each; put them where the tables go")
    return f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}"


def write_block(path: Path, name: str, block: str) -> None:
    """Put the block into the file. Raises DataError as `with_block`."""
    path.write_text(with_block(path.read_text("utf-8"), name, block), encoding="utf-8")
