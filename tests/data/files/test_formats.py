"""What a file is, by its content before its name; and text, compressed files and what is none of ours."""

import gzip
import os

import pyarrow as pa
import pytest

from rlhfjax.data.files import format_of, opening, read_objects
from rlhfjax.errors import DataError

LINES, ARRAY = b'{"text": "a"}\n{"text": "b"}\n', b'[\n{"text": "a"},\n{"text": "b"}\n]'


def gz(data):
    return gzip.compress(data, mtime=0)  # the names of tests hold no time


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", LINES, "JSON lines"),
        ("a.json", LINES, "JSON lines"),
        ("a.txt", LINES, "JSON lines"),
        ("a.csv", LINES, "JSON lines"),
        ("a", LINES, "JSON lines"),
        ("a.jsonl", ARRAY, "JSON"),
        ("a.json", ARRAY, "JSON"),
        ("a.dat", ARRAY, "JSON"),
        ("a.jsonl.gz", gz(LINES), "JSON lines, gzip"),
        ("a.jsonl", gz(LINES[:14]) + gz(LINES[14:]), "JSON lines, gzip"),
        ("a.jsonl.gz", LINES, "JSON lines"),
        ("a.json.zst", zstd(ARRAY), "JSON, zstd"),
        ("a.ndjson.zst", zstd(LINES[:14]) + zstd(LINES[14:]), "JSON lines, zstd"),
        ("a.csv", b"text\na\nb\n", "CSV"),
        ("a.csv.gz", gz(b"text\na\nb\n"), "CSV, gzip"),
        ("a.TSV", b"text\tn\na\t\nb\t\n", "TSV"),
        ("a.txt", b"a\n\nb\n", "plain text"),
        ("a.txt.gz", gz(b"a\n\n\nb"), "plain text, gzip"),
        ("README", b"a\n\nb\n", "plain text"),
    ],
)
def test_the_same_two_texts_in_many_files(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(format_of(path)) == said
    assert [obj["text"] for _, obj in read_objects(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"PK\x03\x04xxxx", "got a ZIP archive"),
        ("a.parquet", b'{"text": "a"}\n', "expected Parquet, got a file that does not begin with PAR1"),
        ("a.jsonl.gz", gz(b"PAR1xxxx"), "expected Parquet as it is, got it inside gzip"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("a.yaml", b"a: b", "expected a file that ends in .jsonl"),
        ("a", b"\x00\x01", "got binary data"),
        ("a.jsonl.gz", gz(LINES * 99)[:-9], "expected a whole gzip file"),
        ("a.jsonl.gz", gz(LINES)[:20] + b"\xff" * 30, "expected a whole gzip file"),
        ("a.jsonl.zst", zstd(LINES * 99)[:-3], "expected a whole zstd file"),
    ],
)
def test_what_is_none_of_ours_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_objects(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compress", [gz, zstd])
def test_a_small_file_that_unpacks_without_end_is_stopped(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(opening, "_ALWAYS_ALLOWED", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(compress(b"\n" * (4 << 20)))
    with pytest.raises(DataError, match=r"at most 200 times its size unpacked, got more"):
        list(read_objects(path))
    path.write_bytes(compress(LINES * 30_000))  # 840 kB, allowed however small it is packed
    assert sum(1 for _ in read_objects(path)) == 60_000


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("none.jsonl", "No such file"),
        ("gone", "No such file"),
        ("x" * 300, "File name too long"),
        ("pipe", "got a pipe or a device"),
        ("", "got a directory"),
        ("a\0b", "null byte"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_objects(tmp_path / name))


TEXT = "A film\n  for a rainy day.\n \t\n\nAnother text.\r\n\r\n\r\n"


@pytest.mark.parametrize(
    ("sample_by", "documents"),
    [
        ("paragraph", [(1, "A film\n  for a rainy day."), (5, "Another text.")]),
        ("line", [(1, "A film"), (2, "  for a rainy day."), (5, "Another text.")]),
        ("document", [(1, "A film\n  for a rainy day.\n \t\n\nAnother text.")]),
    ],
)
def test_plain_text_is_documents(tmp_path, sample_by, documents):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert list(read_objects(path, sample_by)) == [(f"{path}:{line}", {"text": text}) for line, text in documents]


def test_a_document_beyond_the_limit_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_ROW_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_text("short\n\n" + "word word word\n" * 20)
    with pytest.raises(DataError, match=r"a\.txt:3: expected documents of at most .* sample_by: line"):
        list(read_objects(path))
    assert len(list(read_objects(path, "line"))) == 21
