"""JSONL files to TFDS datasets."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlhfjax.data.records import check_kind, read_jsonl
from rlhfjax.data.writing import VERSION, RecordBuilder, publish, read_manifest, staging, write_builder
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.fetch import file_sha256

Edit = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class JsonlBuilder(RecordBuilder, skip_registration=True):
    """TFDS builder of the records in one JSONL file per split, each file's records passed through `edit`."""

    def __init__(
        self, *, name: str, kind: str, paths: Mapping[str, Path], made_from: dict[str, str], edit: Edit, **kwargs: Any
    ):
        # Of this dataset, not of the class: every set of files is a dataset of its own.
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._kind, self._paths, self.made_from, self._edit = kind, dict(paths), made_from, edit
        super().__init__(**kwargs)

    @property
    def kind(self) -> str:
        """The record kind that every line must be."""
        return self._kind

    def split_records(self) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
        """One split per file, in file order."""
        return {split: partial(self._edited, path) for split, path in self._paths.items()}

    def _edited(self, path: Path) -> Iterator[dict[str, Any]]:
        return self._edit(read_jsonl(path, self._kind))


def prepare_jsonl(
    paths_by_split: Mapping[str, str | Path],
    kind: str,
    name: str,
    data_dir: str | Path,
    edit: Edit = iter,
    edit_digest: str = "",
) -> Path:
    """Writes JSONL files as the dataset `name`, one split per file, and returns its folder.

    `edit` may drop or change records; `edit_digest` names it. The same files under the same name are prepared once. A
    wrong line leaves nothing behind.

    Raises DataError with file:line for a wrong line, and where `name` already holds other files; ConfigError for a
    name, split or kind that cannot be one.
    """
    check_kind(kind)
    paths = {split: Path(path).expanduser() for split, path in paths_by_split.items()}
    for what, text in [("dataset name", name), *(("split name", split) for split in paths)]:
        if not _NAME.fullmatch(text) or text == "all":
            raise ConfigError(f"expected a {what} of lower-case letters, digits and _ (and not 'all'), got {text!r}")
    if not paths:
        raise ConfigError(f"expected at least one split with a JSONL file for the dataset {name!r}, got none")
    data_dir, relative = Path(data_dir).expanduser(), Path(name, VERSION)
    made_from = {split: _digest(path) for split, path in paths.items()} | ({"edit": edit_digest} if edit_digest else {})
    if not _already_prepared(data_dir / relative, kind, made_from):
        with staging(data_dir) as stage:
            # Another process may have prepared it while this one waited for its turn.
            if not _already_prepared(data_dir / relative, kind, made_from):
                what = {"name": name, "kind": kind, "paths": paths, "made_from": made_from, "edit": edit}
                write_builder(JsonlBuilder(**what, data_dir=str(stage)))
                publish(stage, data_dir, [relative])
    return data_dir / relative


def prepare_file(path: Path, kind: str, data_dir: Path) -> Path:
    """Writes one JSONL file as the split `train` of a dataset named by its content, so a changed file is a new one."""
    check_kind(kind)
    return prepare_jsonl({"train": path}, kind, f"jsonl_{kind}_{_digest(path)[:24]}", data_dir)


def _already_prepared(folder: Path, kind: str, made_from: dict[str, str]) -> bool:
    if not folder.exists():
        return False
    manifest = read_manifest(folder)
    if manifest.get("made_from") != made_from or manifest.get("kind") != kind:
        raise DataError(
            f"{folder}: expected the dataset of these {kind} files, got one that was made from others; "
            "choose another name, or delete that folder"
        )
    return True


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable JSONL file, got {error.strerror or error}; check the path"
        ) from None
