"""Writing TFDS datasets in ArrayRecord files, records in their order. TensorFlow is not needed and not imported."""

import abc
import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax.data.storage import encode, features
from rlhfjax.data.writing import MANIFEST, VERSION, digests_file
from rlhfjax.plain_json import dumps


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


def write_builder(builder: RecordBuilder) -> None:
    """Writes one builder's dataset where its `data_dir` says, in ArrayRecord files, and says nothing."""
    tfds.display_progress_bar(enable=False)
    # TFDS prints two lines about each dataset, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
