"""Which files a path means, and their splits."""

import pytest

from rlhfjax.data.files import find_files, is_data_path
from rlhfjax.errors import DataError


def folder_with(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "a"}\n')
    return root


def found(source, root):
    shards = find_files(source)
    splits = {split: [str(path.relative_to(root)) for path in paths] for split, paths in shards.splits.items()}
    return splits, [path.name for path in shards.left_out]


FOLDERS = [
    ("a.jsonl b.csv", {"train": "a.jsonl b.csv"}, []),
    ("train.jsonl val.jsonl", {"train": "train.jsonl", "validation": "val.jsonl"}, []),
    ("data.jsonl my_test_2.jsonl", {"train": "data.jsonl", "test": "my_test_2.jsonl"}, []),
    ("train.jsonl other.jsonl", {"train": "train.jsonl"}, ["other.jsonl"]),
    ("train/a.txt train/b.txt dev/a.txt", {"train": "train/a.txt train/b.txt", "validation": "dev/a.txt"}, []),
    ("one/train.jsonl.gz two/train.jsonl.gz", {"train": "one/train.jsonl.gz two/train.jsonl.gz"}, []),
    ("test/train.jsonl train/dev/a.jsonl", {"train": "test/train.jsonl", "validation": "train/dev/a.jsonl"}, []),
    ("latest.jsonl devil.jsonl", {"train": "devil.jsonl latest.jsonl"}, []),
    ("a.jsonl .b.jsonl _c.jsonl .git/d.jsonl README.md dataset_info.json p.png", {"train": "a.jsonl"}, []),
    (
        "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
        {
            "train": "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet",
            "test": "data/test-00000-of-00001.parquet",
        },
        [],
    ),
]


@pytest.mark.parametrize(("names", "splits", "left_out"), FOLDERS)
def test_folders(tmp_path, names, splits, left_out):
    root = folder_with(tmp_path / "train_runs" / "f", *names.split())  # what is above the folder says nothing
    assert found(str(root), root) == ({split: held.split() for split, held in splits.items()}, left_out)


def test_patterns_and_files_are_train_unless_names_say_more(tmp_path):
    folder_with(tmp_path, "test-1.jsonl", "test-2.jsonl", "train-1.jsonl")
    assert found(str(tmp_path / "test-*.jsonl"), tmp_path) == ({"train": ["test-1.jsonl", "test-2.jsonl"]}, [])
    assert found(str(tmp_path / "test-1.jsonl"), tmp_path) == ({"train": ["test-1.jsonl"]}, [])
    both = {"train": ["train-1.jsonl"], "test": ["test-1.jsonl", "test-2.jsonl"]}
    assert found(str(tmp_path / "*.jsonl"), tmp_path) == (both, [])
    (tmp_path / "odd[1].jsonl").write_text("{}")
    assert found(str(tmp_path / "odd[1].jsonl"), tmp_path) == ({"train": ["odd[1].jsonl"]}, [])


def test_a_missing_shard_is_named(tmp_path):
    root = folder_with(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    with pytest.raises(DataError, match=r"expected 3 shards, got 2: train-00001-of-00003 is missing"):
        find_files(root)
    apart = folder_with(tmp_path / "p", "one/a-00000-of-00002.parquet", "two/a-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"one.a-\*: expected 2 shards, got 1"):
        find_files(apart)
    hashed = folder_with(tmp_path / "h", "a-00000-of-00002-12ab.parquet", "a-00001-of-00002-34cd.parquet")
    assert len(find_files(hashed).splits["train"]) == 2


def test_nothing_to_read_is_said(tmp_path):
    for source, message in [
        (tmp_path, "expected a folder with data files"),
        (tmp_path / "*.jsonl", "expected files that match, got none"),
        ("~nobody_of_this_name/a.jsonl", "expected a path"),
    ]:
        with pytest.raises(DataError, match=message):
            find_files(str(source))


def test_the_files_of_a_named_split(tmp_path):
    root = folder_with(tmp_path, "train.jsonl", "test.jsonl")
    assert [path.name for path in find_files(root).of("test", "f")] == ["test.jsonl"]
    with pytest.raises(DataError, match="expected files of the split validation, got splits train, test"):
        find_files(root).of("validation", "f")
    (root / "train.jsonl").unlink()
    assert [path.name for path in find_files(root).of("validation", "f")] == ["test.jsonl"]


def test_what_can_only_be_files(tmp_path):
    (tmp_path / "plain").write_text("text")
    assert [is_data_path(s) for s in ("a.jsonl", "b/*.x", "c.JSON.GZ", str(tmp_path / "plain"))] == [True] * 4
    assert [is_data_path(s) for s in ("movies/chat", "mine:1.0.0", str(tmp_path), "x" * 5000)] == [False] * 4
