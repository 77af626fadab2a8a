"""What a data entry of a configuration names: a dataset of records, files of them, or rows of tokens made of these."""

from pathlib import Path

from rlhfjax.data.datasets import RandomAccess, fingerprint, open_source
from rlhfjax.data.reading import RECOGNISE, Reading
from rlhfjax.data.tokens.folder import token_folder
from rlhfjax.data.tokens.opening import TokenShards
from rlhfjax.errors import DataError


def open_either(
    source: str, split: str, data_dir: Path, kind: str | None = None, reading: Reading = RECOGNISE
) -> RandomAccess | TokenShards:
    """The records of one split, as `open_source` has them, or the rows of tokens that the source names.

    Raises DataError as `open_source`; for rows of another kind or split; and where a layout is said of rows.
    """
    folder = token_folder(source, data_dir)
    if folder is None:
        return open_source(source, split, data_dir, kind, reading)
    shards = TokenShards(folder)
    if kind and shards.kind != kind:
        raise DataError(f"{folder}: expected rows of {kind} records, got {shards.kind}; choose another source")
    if split not in ("train", shards.facts["split"]):
        raise DataError(
            f"{folder}: expected the split {shards.facts['split']}, got {split!r}; a folder of tokens has one"
        )
    if reading != RECOGNISE:
        raise DataError(f"{folder}: expected no layout, map or sample_by for rows of tokens; they were read already")
    return shards


def fingerprint_of(
    source: str, split: str, data_dir: Path, kind: str | None = None, reading: Reading = RECOGNISE
) -> str:
    """SHA-256 of what is read. Raises DataError as `open_either`."""
    if token_folder(source, data_dir) is None:
        return fingerprint(source, split, data_dir, kind, reading)
    opened = open_either(source, split, data_dir, kind, reading)
    assert isinstance(opened, TokenShards)
    return opened.fingerprint
