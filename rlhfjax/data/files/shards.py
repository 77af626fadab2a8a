"""The files that a path means: one file, a glob, a folder of shards; and the split that each belongs to.

Splits are read from names as the hub does: `train`, `validation` (also valid, val, dev) and `test` (also eval) as a
word of a file's name or of a folder's.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhfjax import stores
from rlhfjax.data.files.formats import SUFFIXES
from rlhfjax.data.files.opening import without_compression
from rlhfjax.errors import DataError
from rlhfjax.places import expanded

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of a folder, not in it
_MOST_FILES = 100_000
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Shards:
    """The files of each split in the order that they are read, and those that belong to none."""

    splits: Mapping[str, list[Path]]
    left_out: tuple[Path, ...] = ()

    def words(self) -> Iterator[str]:
        """A line for the files that are in no split, if there are any."""
        if self.left_out:
            names = ", ".join(path.name for path in self.left_out[:3])
            more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
            yield f"files whose names say no split, left out: {names}{more}"

    def of(self, split: str, source: str) -> list[Path]:
        """The files to read as `split`: those of that name, or all where there is one split alone."""
        if split in self.splits or len(self.splits) == 1:
            return self.splits.get(split) or next(iter(self.splits.values()))
        raise DataError(
            f"{source}: expected files of the split {split}, got splits {', '.join(self.splits)}; name a file"
        )


def is_data_path(source: str) -> bool:
    """Whether a source can only be meant as files: it ends as data files do, is a glob, or there is such a file."""
    if without_compression(source.lower()).endswith(SUFFIXES) or _WILD.search(source):
        return True
    return _is_file(expanded(source))


def find_files(source: str | Path) -> Shards:
    """The files that a path means, by split.

    One file is `train`, and so are the files of a glob unless their names tell several splits apart. Of a folder all
    data files at any depth count; those whose names say nothing are `train`, or left out where others are named so.

    Raises DataError where a folder or pattern has no file or more than 100,000, and where one of a row of shards is
    missing.
    """
    source = stores.fetched(source)
    path = expanded(source)
    if _WILD.search(str(source)) and not _is_file(path):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if _is_file(Path(name))]
        if not found:
            raise DataError(f"{source}: expected files that match, got none; check the pattern")
        return _by_split(found, path.parent, only="train")
    if not _is_directory(path):
        return Shards({"train": [path]})
    found = list(_data_files(path))
    if not found:
        raise DataError(f"{path}: expected a folder with data files ({', '.join(SUFFIXES)}; also .gz, .zst), got none")
    return _by_split(found, path)


def _by_split(found: list[Path], root: Path, only: str = "") -> Shards:
    _require_whole_rows(found)
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path, root), []).append(path)
    nameless = splits.pop("", [])
    if not splits or (only and len(splits) == 1):
        return Shards({"train": found})
    if "train" not in splits:
        splits["train"], nameless = nameless, []
    return Shards({name: splits[name] for name in _SPLITS if splits.get(name)}, tuple(nameless))


def _split_of(path: Path, root: Path) -> str:
    """The split that the name says, the file's own before that of the folders that it is in; "" where none does."""
    inside = path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)
    for part in reversed(inside):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLITS.items():
            if any(name in words for name in names):
                return split
    return ""


def _data_files(root: Path) -> Iterator[Path]:
    count = 0
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(names):
            plain = without_compression(name.lower())
            if name.startswith((".", "_")) or not plain.endswith(SUFFIXES) or plain in _ABOUT or plain.endswith(".md"):
                continue
            count += 1
            if count > _MOST_FILES:
                raise DataError(f"{root}: expected at most {_MOST_FILES:,} data files, got more; name a smaller folder")
            yield Path(folder, name)


def _require_whole_rows(found: list[Path]) -> None:
    """Raises DataError where names of the form NAME-00000-of-00003 leave one out."""
    rows: dict[tuple, set[int]] = {}
    for path in found:
        if parts := _SHARD.fullmatch(path.name):
            # What follows the count may be a digest, which differs from shard to shard: only its suffix is the row's.
            key = (path.parent, parts["name"], int(parts["count"]), path.suffix)
            rows.setdefault(key, set()).add(int(parts["number"]))
    for (folder, name, count, _), numbers in rows.items():
        if missing := sorted(set(range(count)) - numbers):
            first = f"{name}-{missing[0]:05}-of-{count:05}"
            raise DataError(
                f"{folder / name}-*: expected {count} shards, got {count - len(missing)}: {first} is missing; "
                "fetch it, or rename the shards that are there"
            )


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # which says no, and raises nothing, for names that are too long or hold a NUL


def _is_directory(path: Path) -> bool:
    return os.path.isdir(path)
