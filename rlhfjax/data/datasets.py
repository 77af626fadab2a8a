"""Prepared datasets: find them, read them by index as canonical records, and name what they hold by a digest.

A source is `name`, `name/config` or `name/config:1.0.0` of a TFDS dataset in the data directory (ours, or any public
one that was prepared there in ArrayRecord format), or the path of files, which are prepared on first use: a file, a
glob or a folder. What can only be meant as files wins over a dataset, a dataset over a folder of its name.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax import stores
from rlhfjax.data.files import is_data_path
from rlhfjax.data.reading import RECOGNISE, Reading
from rlhfjax.data.records import PROMPTED, good_answer, parse_record
from rlhfjax.data.storage import decode
from rlhfjax.data.writing import read_manifest, require_whole
from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.fetch import file_sha256
from rlhfjax.places import expanded, user_cache

_SOURCE = re.compile(r"(?P<name>[A-Za-z_]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type", "proto_cls")
_SHOWN = 8
_CHUNK = 256


class RandomAccess(Sequence[dict[str, Any]]):
    """One split of a prepared dataset as a sequence of records: Python strings, numbers and lists.

    Records of a dataset that was not prepared by this package are checked against `kind` as they are read, or returned
    as they are where `kind` is None. Read as demonstrations, unpaired records are those whose label is true. Raises
    IntegrityError where a record's stored checksum does not match.
    """

    def __init__(self, folder: Path, split: str, kind: str | None):
        self.folder, self.split, self.manifest = folder, split, read_manifest(folder)
        own_kind = self.manifest.get("kind")
        good_only = (own_kind, kind) == ("unpaired", "demonstration")
        if own_kind and kind and own_kind != kind and not good_only:
            raise DataError(f"{folder}: expected a dataset of {kind} records, got {own_kind}; choose another source")
        self.kind, self._foreign = own_kind or kind, own_kind is None
        self._rows = _data_source(folder, split)
        self._good: list[int] | None = None
        if good_only:
            self._good = [row for row, record in enumerate(self) if record["label"]]

    @property
    def notes(self) -> list[str]:
        """What was said when the dataset was prepared: layouts, and fields that nobody reads."""
        bad = 0 if self._good is None else len(self._rows) - len(self._good)
        left = [f"{bad:,} of {len(self._rows):,} answers left out: their label is false"] if bad else []
        return [*self.manifest.get("notes", []), *left]

    @property
    def forms(self) -> set[str]:
        """Whether prompts are `messages`, `plain`, or both; nothing of records without prompts, or where not known."""
        split = self.split if self.split in self.manifest.get("messages", {}) else self.split.split("[")[0]
        messages, count = (self.manifest.get(name, {}).get(split, 0) for name in ("messages", "counts"))
        if self.kind not in PROMPTED or "messages" not in self.manifest:
            return set()
        return ({"messages"} if messages else set()) | ({"plain"} if messages < count else set())

    def __len__(self) -> int:
        return len(self._rows) if self._good is None else len(self._good)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Several records at once, several times faster than one by one."""
        rows = [self._row(index) for index in indices]
        try:
            examples = self._rows.__getitems__(rows) if rows else []
        except RuntimeError as error:
            raise IntegrityError(
                f"{self.folder}: expected intact {self.split} records, got {error}; delete the folder, prepare it again"
            ) from None
        return [self._record(row, example) for row, example in zip(rows, examples, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _CHUNK):
            yield from self.__getitems__(range(start, min(start + _CHUNK, len(self))))

    def _row(self, index: int) -> int:
        row = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return row if self._good is None else self._good[row]

    def _record(self, row: int, example: Any) -> dict[str, Any]:
        if not self._foreign and self.kind:
            record = decode(self.kind, example)
            return record if self._good is None else good_answer(record)
        where = f"{self.folder}:{self.split}[{row}]"
        return parse_record(self.kind, _plain(example), where) if self.kind else _plain(example)


def open_source(
    source: str, split: str, data_dir: str | Path, kind: str | None = None, reading: Reading = RECOGNISE
) -> RandomAccess:
    """The records of one split, `split` being a name or a TFDS expression such as `train[:90%]`.

    Files are checked from the first row to the last and prepared under a name made of their content's digest; without
    `kind` they hold what their layout gives first. The split of a file, or of files whose names say none, is `train`.

    Raises DataError where the dataset, config, version or split is not there (it says what is), where it holds
    records of another kind, and for a wrong row of a file.
    """
    return RandomAccess(_locate(source, Path(data_dir), kind, reading), split, kind)


def fingerprint(
    source: str, split: str, data_dir: str | Path, kind: str | None = None, reading: Reading = RECOGNISE
) -> str:
    """SHA-256 of what a split holds: of its canonical records, whatever machine wrote them and however packed.

    For a split expression it covers all splits and the expression; for a dataset that this package did not prepare,
    the bytes of its files. Raises DataError as `open_source`.
    """
    folder = _locate(source, Path(data_dir), kind, reading)
    _data_source(folder, split)  # an unknown split is an error here too
    digests = read_manifest(folder).get("sha256")
    if digests is None:
        digests = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    if split in digests:
        return digests[split]
    return hashlib.sha256(json.dumps([split, digests], sort_keys=True).encode()).hexdigest()


def default_data_dir() -> Path:
    """`$RLHFJAX_DATA_DIR`, else `$XDG_CACHE_HOME/rlhfjax/datasets`, else `~/.cache/rlhfjax/datasets`.

    Raises DataError for a user without a home directory who names none of the first two.
    """
    if own := os.environ.get("RLHFJAX_DATA_DIR"):
        return expanded(own)
    return user_cache("datasets", "--data-dir DIR, data_dir in the configuration, RLHFJAX_DATA_DIR")


def _locate(source: str, data_dir: Path, kind: str | None, reading: Reading) -> Path:
    """The folder of one version of the dataset that `source` names."""
    stores.require_local(data_dir, "data_dir")
    data_dir = expanded(data_dir)
    if not is_data_path(source):
        parts = _SOURCE.fullmatch(source)
        if parts and (found := _version_folder(data_dir, **parts.groupdict())):
            return found
        if not source or not os.path.isdir(expanded(stores.fetched(source))):
            raise _missing(source, data_dir)
    from rlhfjax.data.preparing import prepare_source  # which needs TFDS

    return prepare_source(source, kind, data_dir, reading)


def _version_folder(data_dir: Path, name: str, config: str | None, version: str | None) -> Path | None:
    parent = data_dir / name / config if config else data_dir / name
    versions = (
        [path.name for path in parent.glob("*/") if _VERSION.fullmatch(path.name)] if os.path.isdir(parent) else []
    )
    if version in versions or (versions and version is None):
        return parent / (version or max(versions, key=lambda text: tuple(map(int, text.split(".")))))
    return None


def _missing(source: str, data_dir: Path) -> DataError:
    infos = data_dir.glob("[!.]*/**/dataset_info.json") if os.path.isdir(data_dir) else ()
    names = [f"{'/'.join(path.relative_to(data_dir).parts[:-2])}:{path.parent.name}" for path in infos]
    nearest = sorted(names, key=lambda name: (-difflib.SequenceMatcher(None, source, name).ratio(), name))[:_SHOWN]
    there = ", ".join(nearest) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    what = "movies" if source.startswith("movies") else "NAME --kind KIND --split train=FILE"
    return DataError(
        f"expected the dataset {source!r} in {data_dir}, got {there or 'nothing prepared there'}; "
        f"run `rlhfjax data prepare {what}`, or correct the name"
    )


def _data_source(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds  # who reads rows of tokens does without it

    require_whole(folder)
    _refuse_foreign_code(folder)
    try:
        builder = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits)
    except Exception as error:  # TFDS reads JSON into protocol buffers here, and raises whatever its parsers raise
        raise DataError(
            f"{folder}: expected a TFDS dataset, got {type(error).__name__}; delete the folder and prepare it again"
        ) from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        got = f"{builder.info.file_format and builder.info.file_format.value} files"
        raise DataError(f"{folder}: expected ArrayRecord files, got {got}; prepare with file_format='array_record'")
    try:
        return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]  # hidden by a decorator
    except (ValueError, AssertionError):
        raise DataError(f"{folder}: expected a split among {', '.join(splits)}, got {split!r}") from None


def _refuse_foreign_code(folder: Path) -> None:
    """TFDS imports the classes that features.json names: only its own may be named, never a module from a dataset."""
    try:
        waiting = [json.loads((folder / "features.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder}: expected a TFDS dataset, got {type(error).__name__} on features.json; prepare it again"
        ) from None
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
            named = [str(item[key]) for key in _CLASS_KEYS if isinstance(item.get(key), str)]
            if not all(name.startswith("tensorflow_datasets.") for name in named):
                raise DataError(f"{folder}: expected features of tensorflow_datasets alone, got {', '.join(named)}")


def _plain(value: Any) -> Any:
    """What TFDS decodes, as Python strings, numbers, lists and dictionaries."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
