"""Opening prepared datasets: names, versions, splits, foreign TFDS datasets, damage, and digests."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhfjax.data.datasets import default_data_dir, fingerprint, open_source
from rlhfjax.data.preparing import prepare_files
from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.integrity import MANIFEST


class ForeignReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset that some other TFDS user prepared: shuffled, with its own features."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["bad", "good"]),
            "words": tfds.features.Sequence(tfds.features.Text()),
            "scores": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"review {i}", "label": i % 2, "words": ["é"] * (i % 2), "scores": [i, 0.5]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A data directory with one dataset of ours, `mine` (10 documents), and one foreign one."""
    folder = tmp_path_factory.mktemp("data")
    path = folder.parent / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(10)))
    prepare_files({"train": path, "validation": path}, "document", "mine", folder)
    ForeignReviews(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return folder


def test_random_access(data_dir):
    records = open_source("mine", "train", data_dir, "document")
    texts = [{"text": f"text {i}"} for i in range(10)]
    assert len(records) == 10
    assert [records[i] for i in range(10)] == list(records) == texts
    assert records[-1] == records[np.int64(9)] == texts[9]
    assert records.__getitems__(np.array([3, 3, 0])) == [texts[3], texts[3], texts[0]]
    assert records.__getitems__([]) == []
    for index in (10, -11):
        with pytest.raises(IndexError):
            records[index]


@pytest.mark.parametrize(("split", "count"), [("train[:30%]", 3), ("train[8:]", 2), ("train+validation", 20)])
def test_split_expressions(data_dir, split, count):
    assert len(open_source("mine:1.0.0", split, data_dir)) == count


@pytest.mark.parametrize("source", ["mine:1.0.1", "mine/config", "mine/config:1.0.0", "yours", "../mine", "", "mine/"])
def test_a_missing_dataset_says_what_there_is_and_what_to_run(data_dir, source):
    with pytest.raises(
        DataError,
        match=r"foreign_reviews:2\.0\.0.*run `rlhfjax data prepare NAME --kind KIND --split train=FILE`",
    ):
        open_source(source, "train", data_dir)
    with pytest.raises(DataError, match="run `rlhfjax data prepare movies`"):
        open_source("movies/chat", "train", data_dir)


def test_the_newest_version_is_the_default(data_dir, tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        shutil.copytree(data_dir / "foreign_reviews" / "2.0.0", tmp_path / "reviews" / version)
    assert open_source("reviews", "train", tmp_path).folder.name == "1.10.0"
    assert open_source("reviews:1.9.0", "train", tmp_path).folder.name == "1.9.0"


def test_unknown_split_and_wrong_kind(data_dir):
    for split in ("test", "train[", "train[:200%]]"):
        with pytest.raises(DataError, match=f"expected a split among train, validation, got '{split[:4]}"):
            open_source("mine", split, data_dir)
    with pytest.raises(DataError, match="expected a dataset of prompt records, got document"):
        open_source("mine", "train", data_dir, "prompt")


def test_a_file_tells_its_kind(data_dir):
    assert open_source(str(data_dir.parent / "mine.jsonl"), "train", data_dir).kind == "document"


def test_a_foreign_dataset_is_plain_python_and_checked_as_a_kind(data_dir):
    plain = {record["text"]: record for record in open_source("foreign_reviews", "train", data_dir)}
    assert len(plain) == 20
    assert plain["review 3"] == {"text": "review 3", "label": 1, "words": ["é"], "scores": [3.0, 0.5]}
    assert plain["review 2"]["words"] == []
    assert type(plain["review 3"]["label"]) is int
    record = open_source("foreign_reviews", "test", data_dir, "document")[0]
    assert set(record) == {"text", "extra"}
    assert set(record["extra"]) == {"label", "words", "scores"}
    with pytest.raises(DataError, match=r"2\.0\.0:test\[1\]: prompt: expected this field"):
        open_source("foreign_reviews", "test", data_dir, "prompt")[1]


def test_fingerprint_is_the_digest_of_the_canonical_records(data_dir):
    lines = b"".join(b'{"text":"text %d"}\n' % i for i in range(10))
    assert fingerprint("mine", "train", data_dir) == hashlib.sha256(lines).hexdigest()
    whole, half = (fingerprint("mine", split, data_dir) for split in ("train", "train[:50%]"))
    assert half not in (whole, fingerprint("mine", "train[50%:]", data_dir))
    with pytest.raises(DataError, match="expected a split"):
        fingerprint("mine", "test", data_dir)


def test_fingerprint_of_a_foreign_dataset_covers_its_bytes(data_dir, tmp_path):
    before = fingerprint("foreign_reviews", "train", data_dir)
    copy = shutil.copytree(data_dir / "foreign_reviews", tmp_path / "foreign_reviews")
    assert fingerprint("foreign_reviews", "train", tmp_path) == before
    shard = next(copy.glob("*/*train*record*"))
    shard.write_bytes(shard.read_bytes() + b"x")
    assert fingerprint("foreign_reviews", "train", tmp_path) != before


def test_damaged_records_are_an_integrity_error(data_dir, tmp_path):
    copy = shutil.copytree(data_dir / "mine", tmp_path / "mine")
    shard = next(copy.glob("*/*train*record*"))
    content = bytearray(shard.read_bytes())
    place = content.find(b"text 5")
    place = place if place > 0 else 200  # the first chunk of records, where they are compressed
    content[place] ^= 4
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match="prepare it again"):
        list(open_source("mine", "train", tmp_path))


def test_a_damaged_folder_is_one_clear_error(data_dir, tmp_path):
    copy = shutil.copytree(data_dir / "mine", tmp_path / "mine")
    (copy / "1.0.0" / MANIFEST).unlink()  # as older versions prepared them
    (copy / "1.0.0" / "rlhfjax.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"rlhfjax\.json: expected JSON"):
        open_source("mine", "train", tmp_path)
    (copy / "1.0.0" / "rlhfjax.json").unlink()
    (copy / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="expected a TFDS dataset"):
        open_source("mine", "train", tmp_path)


def test_a_prepared_folder_is_what_was_written(data_dir, tmp_path):
    # fails when only what TFDS reads is looked at: a fingerprint could be another one
    folder = shutil.copytree(data_dir / "mine", tmp_path / "mine") / "1.0.0"
    told = (folder / "rlhfjax.json").read_text(encoding="utf-8")
    digest = json.loads(told)["sha256"]["train"]
    (folder / "rlhfjax.json").write_text(told.replace(digest, digest[::-1]), encoding="utf-8")
    for opened in (open_source, fingerprint):
        with pytest.raises(IntegrityError, match=r"rlhfjax\.json: expected digest .*; delete the folder"):
            opened("mine", "train", tmp_path)
    (folder / "rlhfjax.json").write_text(told, encoding="utf-8")
    assert fingerprint("mine", "train", tmp_path) == digest
    shard = next(folder.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"array_record.*: expected size "):
        open_source("mine", "train", tmp_path)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name"])
def test_a_dataset_cannot_name_code_to_import(data_dir, tmp_path, key, monkeypatch):
    copy = shutil.copytree(data_dir / "mine", tmp_path / "mine")
    (copy / "1.0.0" / MANIFEST).unlink()
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    features = copy / "1.0.0" / "features.json"
    text = features.read_text().replace('"pythonClassName"', f'"{key}"')
    features.write_text(text.replace("tensorflow_datasets.core.features.text_feature.Text", "payload.Text"))
    with pytest.raises(DataError, match=r"expected features of tensorflow_datasets alone, got payload\.Text"):
        open_source("mine", "train", tmp_path)


def test_other_file_formats_are_refused(data_dir, tmp_path):
    copy = shutil.copytree(data_dir / "foreign_reviews", tmp_path / "foreign_reviews")
    info = copy / "2.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="expected ArrayRecord files, got tfrecord files"):
        open_source("foreign_reviews", "train", tmp_path)


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHFJAX_DATA_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".cache" / "rlhfjax" / "datasets"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_data_dir() == Path("/cache/rlhfjax/datasets")
    monkeypatch.setenv("RLHFJAX_DATA_DIR", "~/mine")
    assert default_data_dir() == tmp_path / "mine"
