"""Writing TFDS datasets in ArrayRecord files: order kept, all or nothing.

A dataset is built in a staging folder inside the data directory and renamed into place when it is whole, so a killed
or failed preparation never leaves something that looks prepared. TensorFlow is not needed and not imported.
"""

import abc
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax.data.storage import encode, features
from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.integrity import read_manifest as written_files
from rlhfjax.integrity import require_intact, sync, verifying, write_manifest
from rlhfjax.plain_json import dumps

VERSION = "1.0.0"
MANIFEST = "rlhfjax.json"
_STAGING_PREFIX = ".incomplete-"
_SMALL = 1 << 16  # bytes; what describes a dataset is read whole whenever it is opened, records are not


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of canonical records of one kind.

    Beside them are a manifest of kind, counts and digests, and the digests of single records.
    """

    VERSION: ClassVar = tfds.core.Version(VERSION)
    made_from: dict[str, str]  # SHA-256 of what the records were read from

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The record kind, a key of the storage table."""

    @abc.abstractmethod
    def split_records(self) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
        """For each split, a function that starts its stream of canonical records."""

    def notes(self) -> list[str]:
        """What a reader of the dataset should know, a line each; asked for once everything is written."""
        return []

    def _info(self) -> tfds.core.DatasetInfo:
        # Records stay in the order they are given: shuffling belongs to the reader, which knows seed and epoch.
        return tfds.core.DatasetInfo(builder=self, features=features(self.kind), disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        self._digests, self._counts, self._messages = {}, {}, {}
        return {split: self._generate_examples(split, start) for split, start in self.split_records().items()}

    def _generate_examples(self, split: str, start: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[Any]:
        digest, count, messages = hashlib.sha256(), 0, 0
        with (Path(self.data_dir) / digests_file(split)).open("wb") as rows:
            for count, record in enumerate(start(), 1):
                line = dumps(record, sort_keys=True, separators=(",", ":")).encode()
                digest.update(line + b"\n")
                rows.write(hashlib.blake2b(line, digest_size=8).digest())
                messages += "messages" in record
                yield count - 1, encode(self.kind, record)
        self._digests[split], self._counts[split], self._messages[split] = digest.hexdigest(), count, messages

    def _post_download_and_prepare_hook(self) -> None:
        manifest = {"kind": self.kind, "counts": self._counts, "sha256": self._digests, "made_from": self.made_from}
        manifest |= {"messages": self._messages, "notes": self.notes()}
        (Path(self.data_dir) / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def digests_file(split: str) -> str:
    """The name of the file with eight bytes of BLAKE2b of each record of a split, by which a changed one is found."""
    return f"rows-{split}.digests"


def write_builder(builder: RecordBuilder) -> None:
    """Writes one builder's dataset where its `data_dir` says, in ArrayRecord files, and says nothing."""
    tfds.display_progress_bar(enable=False)
    # TFDS prints two lines about each dataset, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared dataset; empty for one that this package did not prepare."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: expected JSON, got {error}; delete the folder and prepare it again") from None


def require_whole(folder: Path) -> None:
    """Compare a prepared dataset with the manifest of its files, as far as that is cheap at every start.

    Names and sizes always, contents of small files too: counts, features and fingerprints are in these. Records lie in
    files that have checksums of their own, which reading compares; `rlhfjax verify` reads everything. A dataset of
    another program, or of an older version, has no manifest. Raises IntegrityError.
    """
    if verifying() and written_files(folder) is not None:
        require_intact(folder, "delete the folder and prepare it again", digests=False, small=_SMALL)


@contextlib.contextmanager
def staging(data_dir: Path) -> Iterator[Path]:
    """A private folder inside `data_dir` to build in. One writer at a time; what a killed one left is removed first."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (data_dir / ".lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write to the data directory {data_dir}: {error.strerror}; give another one") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees it when the process ends, however it ends
        for stale in data_dir.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=data_dir))
        try:
            yield stage
        except OSError as error:
            raise DataError(
                f"could not write a dataset to {data_dir}: {error}; make room, or give another one"
            ) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, data_dir: Path, datasets: Sequence[Path]) -> None:
    """Moves finished datasets (paths relative to both folders) into place, readable by the owner alone."""
    for relative in datasets:
        for folder, _, files in os.walk(stage / relative):
            os.chmod(folder, 0o700)
            for file in files:
                os.chmod(Path(folder, file), 0o600)
        write_manifest(stage / relative)
        target = data_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.rename(stage / relative, target)
        sync(target.parent)
