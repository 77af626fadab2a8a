"""Prepared data against the digests of when they were prepared, to find what changed since: every byte is read."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from rlhfjax.data.datasets import RandomAccess
from rlhfjax.data.writing import read_manifest
from rlhfjax.errors import RlhfjaxError
from rlhfjax.integrity import MANIFEST, check


def changed_since_preparation(folder: Path, split: str) -> Iterator[str]:
    """A line for each file that is not what was prepared.

    Where an older version prepared it, the records are read instead, and the line is for a split: for every one where
    `split` is an expression. Of a dataset that another program prepared nothing is known, and nothing said.
    """
    if (folder / MANIFEST).exists():
        try:
            yield from (f"{folder}: {difference}" for difference in check(folder).differences)
        except RlhfjaxError as error:
            yield str(error)
        return
    digests = read_manifest(folder).get("sha256", {})
    for name in [split] if split in digests else digests:
        try:
            digest = _digest(RandomAccess(folder, name, None))
        except RlhfjaxError as error:
            yield str(error)
            continue
        if digest != digests[name]:
            yield f"{folder}: expected {name} records with SHA-256 {digests[name][:12]}…, got {digest[:12]}…"


def _digest(records: RandomAccess) -> str:
    """As it was taken when the records were written (`rlhfjax.data.writing`)."""
    digest = hashlib.sha256()
    for record in records:
        line = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
