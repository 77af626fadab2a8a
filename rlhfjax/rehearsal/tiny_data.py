"""Data of a rehearsal: a few records of what the configuration reads, cut short, or made up where that is not here."""

import random
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.sections import Data
from rlhfjax.data.sources import open_either
from rlhfjax.data.tokens.opening import TokenShards
from rlhfjax.errors import DataError
from rlhfjax.plain_json import dumps
from rlhfjax.rehearsal.shrinking import kinds_of

_MOST = 64  # records of a kind
_WORDS, _LONGEST = 2, 12  # words of a text, and characters
_MADE_UP = ("film", "story", "ending", "music", "was", "is", "a", "very", "good", "fine", "warm", "bad", "grim", "cold")
Record = dict[str, Any]


def write_data(run: Run, folder: Path, data_dir: Path) -> tuple[dict[str, Path], list[str]]:
    """A file for each kind of record that is read: its path by kind, and the sources that were not here.

    Raises DataError for a source that is here and cannot be read.
    """
    files, absent = {}, []
    for kind, entries in kinds_of(run).items():
        records: list[Record] = []
        for entry in entries:
            found = _read(entry, kind, data_dir)
            absent += [] if found is not None else [entry.source]
            records += [_cut(record) for record in found or ()]
        files[kind] = folder / f"{kind}.jsonl"
        lines = [dumps(record) for record in (records or made_up(kind))[:_MOST]]
        files[kind].write_text("\n".join(lines * -(-16 // len(lines))) + "\n", encoding="utf-8")
    return files, sorted(set(absent))


def _read(entry: Data, kind: str, data_dir: Path) -> list[Record] | None:
    """The first records of an entry; None where it is not here, or is rows of tokens."""
    try:
        opened = open_either(entry.source, entry.split, data_dir, kind, entry.reading)
    except DataError:
        if Path(entry.source).expanduser().exists():
            raise
        return None
    if isinstance(opened, TokenShards):
        return None
    return [dict(opened[index]) for index in islice(range(len(opened)), _MOST)]


def _cut(record: Mapping[str, Any]) -> Record:
    """A record of the same fields with texts of a word or two; of messages the last exchange."""
    made: Record = {}
    for name, value in record.items():
        if name in ("text", "prompt", "completion", "chosen", "rejected") and isinstance(value, str):
            made[name] = _short(value, 12 if name == "text" else _WORDS)
        elif name == "responses":
            made[name] = [_short(text) for text in value]
        elif name == "messages":
            asked = [message for message in value if message.get("role") == "user"][-1:]
            answer = [message for message in value[-1:] if message.get("role") == "assistant"]
            made[name] = [{"role": each["role"], "content": _short(str(each["content"]))} for each in asked + answer]
        else:
            made[name] = value  # a reward may read it
    return made


def _short(text: str, words: int = _WORDS) -> str:
    kept = " ".join(text.split()[:words])[: _LONGEST * -(-words // _WORDS)]
    return (" " if text[:1].isspace() else "") + (kept or "so")


def made_up(kind: str) -> list[Record]:
    """Records of a kind that nobody wrote, the same each time."""
    draw = random.Random(kind)

    def words(most: int) -> str:
        return " ".join(draw.choices(_MADE_UP, k=draw.randint(1, most)))

    makers: dict[str, Any] = {
        "document": lambda: {"text": words(20)},
        "demonstration": lambda: {"prompt": words(2), "completion": f" {words(2)}"},
        "comparison": lambda: {"prompt": words(2), "responses": [f" {words(2)}", f" {words(2)}"], "ranks": [1, 2]},
        "prompt": lambda: {"prompt": words(3)},
    }
    return [makers[kind]() for _ in range(_MOST)]


def said(absent: Iterable[str]) -> str:
    """A line of the sources that are made up."""
    return f"not here, and made up in their kind: {', '.join(absent)}"
