"""CSV and Parquet as objects: a cell is text, an empty one no field, a wrong row has its place."""

import csv
import datetime
import decimal
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.files import format_of, opening, read_objects
from rlhfjax.errors import ConfigError, DataError

CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


def written(path, content):
    path.write_bytes(content)
    return path


@settings(deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL), max_size=4), delimiter=st.sampled_from([",", ";", "\t"]))
def test_what_the_library_writes_comes_back(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        table.writerows([("prompt", "completion"), *rows])
    expected = [{name: cell for name, cell in zip(("prompt", "completion"), row, strict=True) if cell} for row in rows]
    assert [obj for _, obj in read_objects(path)] == expected


def test_places_are_the_lines_where_rows_begin(tmp_path):
    path = written(tmp_path / "a.csv", b'\xef\xbb\xbftext,n\r\n"a, b\r\nc",1\r\n\r\nx,\r\n')
    assert list(read_objects(path)) == [(f"{path}:2", {"text": "a, b\r\nc", "n": "1"}), (f"{path}:5", {"text": "x"})]


def test_cells_of_structured_columns_are_values(tmp_path):
    path = written(tmp_path / "a.tsv", b'prompt\tresponses\tranks\tlabel\n[1]\t["a", "b"]\t[1,2]\tTrue\n{}\t[a\t\tno\n')
    assert [obj for _, obj in read_objects(path)] == [
        {"prompt": "[1]", "responses": ["a", "b"], "ranks": [1, 2], "label": True},
        {"prompt": "{}", "responses": "[a", "label": "no"},
    ]


WRONG = [
    (b"text,n\na,1\nb\n", ":3: expected 2 cells as in the header, got 1"),
    (b"text,n\na,b,1\n", ":2: expected 2 cells as in the header, got 3"),
    (b"text,text\na,b\n", ":1: expected a header with a name of its own for each column"),
    (b'text\n"abc\n\ndef', ":2: expected CSV"),
    (b'text\n"abc"def\n', ":2: expected CSV"),
    (b"text\na\nb\xff\n", ":3: expected UTF-8 text, got byte 0xff at byte 2"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_wrong_rows_have_their_line(tmp_path, content, message):
    path = written(tmp_path / "a.csv", content)
    with pytest.raises(DataError) as error:
        list(read_objects(path))
    assert f"{path}{message}" in str(error.value)


def test_an_open_quote_is_bounded_and_a_long_text_is_not_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_ROW_BYTES", 300_000)
    before = csv.field_size_limit()
    assert before < 200_000  # what the library stops at
    path = written(tmp_path / "a.csv", b"text\n" + b"x" * 200_000 + b"\n")
    assert [len(obj["text"]) for _, obj in read_objects(path)] == [200_000]
    path = written(tmp_path / "a.csv", b'text\n"' + b"x\n" * 200_000)
    with pytest.raises(DataError, match=r"a\.csv:2: expected CSV with fields of at most"):
        list(read_objects(path))
    assert csv.field_size_limit() == before


def test_parquet_rows_are_plain_values_without_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [
        {"prompt": "a", "messages": [{"role": "user", "name": None, "content": "x"}], "n": 1, "when": None},
        {"prompt": None, "messages": None, "n": None, "when": datetime.datetime(2026, 1, 2, 3, 4, 5)},
        {"prompt": "b", "messages": [], "n": 2**40, "when": None},
    ]
    table = pa.Table.from_pylist(rows).append_column("price", pa.array([decimal.Decimal("1.50"), None, None]))
    table = table.append_column("score", pa.array([0.5, float("nan"), -1.0]))
    table = table.append_column("raw", pa.array([b"text", None, None]))
    pq.write_table(table, path, row_group_size=2)
    assert list(read_objects(path)) == [
        (
            f"{path}:row 1",
            {
                "prompt": "a",
                "messages": [{"role": "user", "content": "x"}],
                "n": 1,
                "price": "1.50",
                "score": 0.5,
                "raw": "text",
            },
        ),
        (f"{path}:row 2", {"when": "2026-01-02T03:04:05"}),
        (f"{path}:row 3", {"prompt": "b", "messages": [], "n": 2**40, "score": -1.0}),
    ]


def test_binary_and_infinite_cells_name_their_row_and_field(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": pa.array([{"bytes": b"ok"}, {"bytes": b"\xff\xd8"}])}), path)
    with pytest.raises(DataError, match=r"a\.parquet:row 2: x\.bytes: expected text, got binary data"):
        list(read_objects(path))
    pq.write_table(pa.table({"x": [[1.0], [float("inf")]]}), path)
    with pytest.raises(DataError, match=r"row 2: x\[0\]: expected a finite number, got inf"):
        list(read_objects(path))


def test_a_row_beyond_the_limit_is_refused_in_pieces(tmp_path, monkeypatch):
    """A dictionary makes a kilobyte of file of every gigabyte of rows: what is read at a time is bounded."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 100_000] * 2000}), path)
    assert path.stat().st_size < 1 << 20
    assert sum(len(obj["text"]) for _, obj in read_objects(path)) == 200_000_000
    monkeypatch.setattr(opening, "MAX_ROW_BYTES", 50_000)
    with pytest.raises(DataError, match=r"row 1: expected rows of at most"):
        list(read_objects(path))


def test_a_broken_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100}), path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:60], whole[:40] + b"\xff" * 30 + whole[70:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: expected a whole Parquet file, got ") as error:
            list(read_objects(path))
        assert "\n" not in str(error.value)


def test_without_pyarrow_the_message_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content in (("a.parquet", b"PAR1"), ("a.jsonl.zst", b"\x28\xb5\x2f\xfd")):
        path = written(tmp_path / name, content)
        with pytest.raises(ConfigError, match=r"needs pyarrow.*pip install 'rlhfjax\[parquet\]'"):
            list(read_objects(path))


@pytest.mark.parametrize(("header", "delimiter"), [(b"a,b", ","), (b"a;b;c,d", ";"), (b"a\tb", "\t"), (b"a", ",")])
def test_the_delimiter_is_what_the_header_has_most_of(tmp_path, header, delimiter):
    assert format_of(written(tmp_path / "a.csv", header + b"\n")).delimiter == delimiter
