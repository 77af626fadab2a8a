"""What a preparation of tokens does, written down before it begins: from which bytes which rows are to be made.

The parts into which a source is cut follow from it alone, never from who makes them, so that any number of processes
makes the same shards, and one that was stopped is gone on with.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rlhfjax import stores
from rlhfjax.data.datasets import RandomAccess, fingerprint, open_source
from rlhfjax.data.files import find_files, is_data_path
from rlhfjax.data.reading import DataFile, Reading, data_file
from rlhfjax.data.records import check_kind
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.places import expanded
from rlhfjax.record_kinds import reading_of
from rlhfjax.text.loading import AnyTokenizer

KINDS = ("document", "demonstration", "comparison", "prompt")
PACKED = ("document", "demonstration")
PART_BYTES = 64 << 20
FORMAT = 1


@dataclass(frozen=True)
class Rows:
    """How rows are made: records of a `kind`, of at most `length` tokens, several in a row of them where `packed`.

    `train_on` is which answers of a demonstration are targets (last or all); `overlong` and `refused` say whether
    records that are longer, or that cannot be written, are an error or dropped. Raises ConfigError.
    """

    kind: str
    length: int
    packed: bool = False
    train_on: str = "last"
    overlong: str = "error"
    refused: str = "error"

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.kind not in KINDS:
            raise ConfigError(f"--kind {self.kind}: expected {', '.join(KINDS)}, which a stage reads as tokens")
        if self.packed and self.kind not in PACKED:
            raise ConfigError(f"--pack {self.length}: a {self.kind} has a row of its own; say --length {self.length}")
        if self.length < 2:
            raise ConfigError(f"--{'pack' if self.packed else 'length'} {self.length}: expected at least 2 tokens")
        allowed = {"train_on": ("last", "all"), "overlong": ("error", "drop"), "refused": ("error", "drop")}
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} {getattr(self, name)}: expected {' or '.join(words)}")


@dataclass(frozen=True)
class Part:
    """Lines of a file that begin in the bytes start … end, or rows start … end of a dataset."""

    file: str | None
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Rows, source and tokenizer of one preparation. `files` have path, size, time of the last change, and layout;
    without files it is the `dataset` that is read: folder, split, fingerprint and number of rows.

    `step` bytes, or rows, make a part.
    """

    rows: Rows
    source: str
    split: str
    tokenizer: Mapping[str, Any]
    chat: Mapping[str, Any]
    step: int
    reading: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[Mapping[str, Any]] = ()
    dataset: Mapping[str, Any] | None = None
    format: int = FORMAT

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` described. Raises DataError for one of a later version."""
        if held.get("format") != FORMAT or not {each.name for each in fields(cls)} >= held.keys():
            raise DataError(f"expected a plan of format {FORMAT}, got {held.get('format')}; update rlhfjax")
        return cls(**{**held, "rows": Rows(**held["rows"])})

    def to_json(self) -> dict[str, Any]:
        """As its file holds it."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def identity(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> list[Part]:
        """In the order of their numbers."""
        whole = [(each["path"], each["size"]) for each in self.files]
        whole = whole or [(None, self.dataset["rows"] if self.dataset else 0)]
        return [
            Part(file, start, min(start + self.step, size))
            for file, size in whole
            for start in range(0, size, self.step)
        ]

    def file(self, path: str) -> DataFile:
        """A file with its layout as it was recognised. Raises DataError where it is not what it was."""
        entry = next(each for each in self.files if each["path"] == path)
        if _state(Path(path)) != {"size": entry["size"], "mtime_ns": entry["mtime_ns"]}:
            raise DataError(f"{path}: changed since its preparation began; delete what was prepared, and begin again")
        how = dict(self.reading, layout=None if self.reading["mapping"] else entry["layout"])
        return data_file(path, self.rows.kind, reading_of(**how))

    def records(self) -> RandomAccess:
        """The dataset. Raises DataError where it is not what it was."""
        assert self.dataset
        return RandomAccess(Path(self.dataset["folder"]), self.dataset["split"], self.rows.kind)


def plan_of(
    source: str, split: str, rows: Rows, tokenizer: AnyTokenizer, data_dir: Path, reading: Reading, step: int | None
) -> Plan:
    """What is to be done for a file, pattern, folder or prepared dataset.

    Files of JSON lines are read as they are, in pieces of `step` bytes; others are made a dataset first. Raises
    DataError for a source that is not there or has no such records.
    """
    about = {"kind": tokenizer.kind, "sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    how = {"layout": reading.layout, "mapping": dict(reading.map), "sample_by": reading.sample_by}
    files = _lines(source, split, rows.kind, data_dir, reading)
    common = {"rows": rows, "source": source, "split": split, "tokenizer": about, "chat": tokenizer.chat.to_json()}
    if files:
        told = [{"path": str(file.path), **_state(file.path), "layout": file.layout.name} for file in files]
        return Plan(**common, step=step or PART_BYTES, reading=how, files=told)
    records = open_source(source, split, data_dir, rows.kind, reading)
    told = {
        "folder": str(records.folder),
        "split": split,
        "fingerprint": fingerprint(source, split, data_dir, rows.kind, reading),
        "rows": len(records),
    }
    return Plan(**common, step=step or _rows_a_part(records), reading=how, dataset=told)


def kind_of(source: str, split: str, data_dir: Path, reading: Reading) -> str:
    """The kind of records that a source holds, or that its layout gives first. Raises ConfigError without one."""
    if _names_files(source, data_dir):
        return data_file(find_files(source).of(split, source)[0], None, reading).kind
    kind = open_source(source, split, data_dir, None, reading).kind
    if kind is None:
        raise ConfigError(f"{source}: expected --kind KIND ({', '.join(KINDS)}) for a dataset of another program")
    return kind


def _names_files(source: str, data_dir: Path) -> bool:
    if is_data_path(source):
        return True
    return os.path.isdir(expanded(stores.fetched(source))) and not (expanded(data_dir) / source).is_dir()


def _lines(source: str, split: str, kind: str, data_dir: Path, reading: Reading) -> list[DataFile]:
    """The files of a source where a process can begin anywhere in them; none where it can't."""
    if not _names_files(source, data_dir):
        return []
    paths = find_files(source).of(split, source)
    files = [data_file(os.path.abspath(path), kind, reading) for path in paths]
    return files if all(file.by_lines for file in files) else []


def _rows_a_part(records: RandomAccess) -> int:
    size = sum(path.stat().st_size for path in records.folder.iterdir() if path.is_file())
    return max(PART_BYTES * len(records) // max(size, 1), 1)


def _state(path: Path) -> dict[str, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: expected a readable data file, got {error.strerror}; check the path") from None
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
