"""One part of a source as one shard: an ArrayRecord file, whole or not at all, and beside it what is in it.

A row is a record of its own group, compressed by Zstandard at level 1, so that reading one row reads that row. Against
a mapped file of plain ids that costs 0.12 ms a row in place of 0.01; but pages that were touched stay in a process's
memory, up to the whole corpus, and files are 1.8 times as large.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from rlhfjax.data.reading import Tally
from rlhfjax.data.token_rows import CHUNK
from rlhfjax.data.tokens.form import id_type
from rlhfjax.data.tokens.plan import Part, Plan
from rlhfjax.data.tokens.rows import Counts, Maker, Placed
from rlhfjax.errors import DataError
from rlhfjax.fetch import file_sha256
from rlhfjax.files import write_json
from rlhfjax.integrity import sync
from rlhfjax.text.loading import AnyTokenizer

_OPTIONS = "group_size:1,zstd:1"
_PIECE = 1 << 20


@dataclass(frozen=True)
class Shard:
    """What is known of a shard when it is whole. `digest` is that of its rows, `sha256` that of its file."""

    number: int
    counts: Counts
    tally: Tally
    digest: str = ""
    sha256: str = ""
    size: int = 0
    source: str = ""

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "Shard":
        """What `to_json` described."""
        tally = Tally(**{**held["tally"], "unread": Counter(held["tally"]["unread"])})
        return cls(**{**held, "counts": Counts(**held["counts"]), "tally": tally})

    def to_json(self) -> dict[str, Any]:
        """As the file beside it holds it."""
        return asdict(self)


def shard_name(number: int, count: int) -> str:
    """The name of a shard's file."""
    return f"rows-{number:05}-of-{count:05}.arrayrecord"


def made_already(folder: Path, number: int, count: int) -> Shard | None:
    """What an earlier preparation made of a part, if it is whole."""
    path = folder / shard_name(number, count)
    try:
        shard = Shard.from_json(json.loads(_beside(path).read_text(encoding="utf-8")))
        whole = not shard.counts.rows or path.stat().st_size == shard.size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if whole and shard.number == number else None


def make_shard(folder: Path, plan: Plan, tokenizer: AnyTokenizer, number: int) -> Shard:
    """Read a part, and write its rows; on the disk when this returns.

    Raises DataError for records that are wrong, and where the disk does not take it.
    """
    parts = plan.parts
    part, path = parts[number], folder / shard_name(number, len(parts))
    try:
        return _made(path, plan, part, number, tokenizer, 0)
    except DataError:
        if part.file is None or not part.start:
            raise
        # Nobody counts the lines before a part until one of its own has to be named.
        return _made(path, plan, part, number, tokenizer, _lines_before(part.file, part.start))


def _made(path: Path, plan: Plan, part: Part, number: int, tokenizer: AnyTokenizer, before: int) -> Shard:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    counts, tally, digest = Counts(), Tally(), hashlib.sha256()
    maker = Maker(plan.rows, tokenizer, id_type(plan.tokenizer["vocab_size"]), counts)
    try:
        with closing(ArrayRecordWriter(str(unfinished), _OPTIONS)) as writer:
            for row in maker.made(_records(plan, part, tally, before)):
                writer.write(row)
                digest.update(len(row).to_bytes(8, "little") + row)
        os.chmod(unfinished, 0o600)
        sync(unfinished)
        file = file_sha256(unfinished), os.path.getsize(unfinished)
        shard = Shard(number, counts, tally, digest.hexdigest(), *file, _digest(part))
        if counts.rows:
            os.replace(unfinished, path)
        write_json(_beside(path), shard.to_json())
    except (OSError, RuntimeError) as error:
        raise DataError(f"could not write {path}: {error}; make room, and run the same command again") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return shard


def _records(plan: Plan, part: Part, tally: Tally, before: int) -> Iterator[Placed]:
    if part.file is not None:
        yield from plan.file(part.file).records_between(part.start, part.end, tally, before)
        return
    records = plan.records()
    for start in range(part.start, part.end, CHUNK):
        rows = range(start, min(start + CHUNK, part.end))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            yield f"{plan.source}@{plan.split} row {row}", record


def _lines_before(path: str, start: int) -> int:
    """How many lines begin before a byte."""
    count, left, piece = 0, start, b""
    with open(path, "rb") as file:
        while left and (piece := file.read(min(_PIECE, left))):
            count, left = count + piece.count(b"\n"), left - len(piece)
    return count + (not piece.endswith(b"\n"))


def _digest(part: Part) -> str:
    """Of the bytes of a file that a part was made from."""
    if part.file is None:
        return ""
    digest, left = hashlib.sha256(), part.end - part.start
    with open(part.file, "rb") as file:
        file.seek(part.start)
        while left and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")
