"""Files to TFDS datasets."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rlhfjax import stores
from rlhfjax.data.building import RecordBuilder, write_builder
from rlhfjax.data.files import find_files
from rlhfjax.data.reading import RECOGNISE, DataFile, Reading, Tally, data_file
from rlhfjax.data.records import check_kind
from rlhfjax.data.writing import VERSION, publish, read_manifest, staging
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.fetch import file_sha256
from rlhfjax.places import expanded

Edit = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]
Files = dict[str, list[DataFile]]
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class FilesBuilder(RecordBuilder, skip_registration=True):
    """TFDS builder of the records in the files of each split, each split's records passed through `edit`."""

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        files: Files,
        made_from: dict[str, str],
        edit: Edit,
        said: Sequence[str],
        **kwargs: Any,
    ):
        # Of this dataset, not of the class: every set of files is a dataset of its own.
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._kind, self._files, self.made_from, self._edit, self._said = kind, files, made_from, edit, said
        self._tallies = {split: [Tally() for _ in held] for split, held in files.items()}
        super().__init__(**kwargs)

    @property
    def kind(self) -> str:
        """The record kind that every row must give."""
        return self._kind

    def split_records(self) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
        """The files of each split one after the other, each in its order."""
        return {split: partial(self._edited, split) for split in self._files}

    def _edited(self, split: str) -> Iterator[dict[str, Any]]:
        each = zip(self._files[split], self._tallies[split], strict=True)
        return self._edit(chain.from_iterable(file.records(tally) for file, tally in each))

    def notes(self) -> list[str]:
        """What the files were taken for where that is not our own layout, and what of them nobody reads."""
        lines = list(self._said)
        for split, files in self._files.items():
            taken: dict[str, list[tuple[DataFile, Tally]]] = {}
            for file, tally in zip(files, self._tallies[split], strict=True):
                taken.setdefault(file.words(), []).append((file, tally))
            for words, held in taken.items():
                total, file = sum((tally for _, tally in held), Tally()), held[0][0]
                said = [words] if file.identity() else []
                said += total.words(self.kind, file.layout.omits(self.kind))
                where = f"{split}: {_named(held)}" if len(self._files) > 1 else _named(held)
                lines += [f"{where}: {line}" for line in said]
        return lines


def _named(held: Sequence[tuple[DataFile, Tally]]) -> str:
    first = held[0][0].path.name
    return first if len(held) == 1 else f"{first} and {len(held) - 1} more"


def prepare_files(
    paths_by_split: Mapping[str, str | Path | Sequence[str | Path]],
    kind: str,
    name: str,
    data_dir: str | Path,
    edit: Edit = iter,
    edit_digest: str = "",
    reading: Reading = RECOGNISE,
) -> Path:
    """Writes files as the dataset `name`, one or several per split, and returns its folder.

    `edit` may drop or change records; `edit_digest` names it. The same files under the same name are prepared once. A
    wrong row leaves nothing behind.

    Raises DataError with the place of a wrong row, and where `name` already holds other files; ConfigError for a name,
    split or kind that cannot be one.
    """
    check_kind(kind)
    stores.require_local(data_dir, "--data-dir")
    given = {
        split: [paths] if isinstance(paths, str | Path) else list(paths) for split, paths in paths_by_split.items()
    }
    for what, text in [("dataset name", name), *(("split name", split) for split in given)]:
        if not _NAME.fullmatch(text) or text == "all":
            raise ConfigError(f"expected a {what} of lower-case letters, digits and _ (and not 'all'), got {text!r}")
    if not any(given.values()):
        raise ConfigError(f"expected at least one split with a file for the dataset {name!r}, got none")
    files = {split: [data_file(path, kind, reading) for path in paths] for split, paths in given.items()}
    return _prepare(files, kind, name, expanded(data_dir), edit, edit_digest)


def prepare_source(source: str | Path, kind: str | None, data_dir: Path, reading: Reading = RECOGNISE) -> Path:
    """Writes a file, glob or folder as a dataset named by its content and layout, so a changed one is a new one.

    Without a `kind` it is the one that the first file's layout gives first. Raises as `prepare_files`.
    """
    shards = find_files(source)
    kind = kind or data_file(next(iter(shards.splits.values()))[0], None, reading).kind
    files = {split: [data_file(path, kind, reading) for path in paths] for split, paths in shards.splits.items()}
    return _prepare(files, kind, "", data_dir, said=list(shards.words()))


def prepare_file(path: Path, kind: str, data_dir: Path) -> Path:
    """The same of one file whose kind is known: its records are the split `train`."""
    return prepare_source(path, kind, data_dir)


def what_was_made(folder: Path, name: str) -> Iterator[str]:
    """In words: the records of each split, what the files were taken for, and what to do next."""
    manifest = read_manifest(folder)
    kind, counts = manifest["kind"], manifest["counts"]
    yield from manifest.get("notes", [])
    held = ", ".join(f"{count:,} in {split}" for split, count in counts.items())
    yield f"{name}: {kind} records: {held}"
    first = next(iter(counts))
    split = "" if first == "train" else f", split: {first}"
    yield f"next: `rlhfjax data inspect {name}@{first}`, and {{source: {name}{split}}} in a configuration"


def _prepare(
    files: Files,
    kind: str,
    name: str,
    data_dir: Path,
    edit: Edit = iter,
    edit_digest: str = "",
    said: Sequence[str] = (),
) -> Path:
    made_from = _made_from(files) | ({"edit": edit_digest} if edit_digest else {})
    name = name or _content_name(kind, made_from)
    relative = Path(name, VERSION)
    if not _already_prepared(data_dir / relative, kind, made_from):
        with staging(data_dir) as stage:
            # Another process may have prepared it while this one waited for its turn.
            if not _already_prepared(data_dir / relative, kind, made_from):
                what = {"name": name, "kind": kind, "files": files, "made_from": made_from, "edit": edit}
                write_builder(FilesBuilder(**what, said=said, data_dir=str(stage)))
                publish(stage, data_dir, [relative])
    return data_dir / relative


def _made_from(files: Files) -> dict[str, str]:
    """By split the digest of its one file, or of those of all its files; and how they are read, where that is said."""
    made_from = {}
    for split, held in files.items():
        digests = [_digest(file.path) for file in held]
        made_from[split] = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    read_as = {split: [file.identity() for file in held] for split, held in files.items()}
    own = not any(any(identities) for identities in read_as.values())
    return made_from if own else made_from | {"read as": json.dumps(read_as, sort_keys=True)}


def _content_name(kind: str, made_from: dict[str, str]) -> str:
    if list(made_from) == ["train"]:
        return f"jsonl_{kind}_{made_from['train'][:24]}"
    return f"files_{kind}_{hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]}"


def _already_prepared(folder: Path, kind: str, made_from: dict[str, str]) -> bool:
    if not folder.exists():
        return False
    manifest = read_manifest(folder)
    if manifest.get("made_from") != made_from or manifest.get("kind") != kind:
        raise DataError(
            f"{folder}: expected the dataset of these {kind} files, got one that was made from others or read in "
            "another way; choose another name, or delete that folder"
        )
    return True


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable data file, got {error.strerror or error}; check the path"
        ) from None
