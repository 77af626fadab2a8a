"""JSON of any shape, strictly: what is read, where, and what is said of what is wrong."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.files import json_values, opening, read_objects
from rlhfjax.errors import DataError

TREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def objects(path):
    return [obj for _, obj in read_objects(path)]


@settings(deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), TREE, max_size=3), min_size=1, max_size=5),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    window=st.sampled_from([1, 2, 7, 1 << 18]),
)
def test_any_array_comes_back_whatever_the_window(tmp_path_factory, rows, indent, ascii_only, window):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_CHUNK", window)
        assert objects(path) == rows


SHAPES = [
    (b'{"a": 1}\n{"a": 2}\n', [":1", ":2"]),
    (b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}', [":1", ":3"]),
    (b'[{"a": 1}, {"a": 2}]', [":1", ":1"]),
    (b'\xef\xbb\xbf\n[\n {"a": 1},\n\n {"a": 2}\n]\n', [":3", ":5"]),
    (b'{\n "a": 1\n}\n{\n "a": 2\n}', [":1", ":4"]),
]


@pytest.mark.parametrize(("content", "places"), SHAPES)
def test_each_shape_is_known_by_its_content_and_has_lines(tmp_path, content, places):
    names = ["a.json", "a"] if content.startswith(b"{\n") else ["a.json", "a", "a.jsonl"]  # of lines has lines
    for path in (tmp_path / name for name in names):
        path.write_bytes(content)
        assert list(read_objects(path)) == [(f"{path}{place}", {"a": i}) for i, place in enumerate(places, 1)]


WRONG = [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2: expected JSON, got Expecting value at column 9"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b', ":2: expected JSON, got Unterminated string starting at column 10"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": NaN}\n', ":3: expected JSON, got NaN, which is no JSON number"),
    ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', ":1: expected JSON, got Extra data"),
    ("a.jsonl", b'{"text": "a\xff"}\n', ":1: expected UTF-8 text, got byte 0xff at byte 12"),
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ":1: expected UTF-8 text"),
    ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", ":1: expected JSON, got Exceeds the limit"),
    ("a.jsonl", b'{"text": "a", "n": [-1e999]}\n', ":1: expected JSON, got -1e999, which is beyond a float"),
    ("a.jsonl", b'{"a": 1}\n{"b": 1, "c": 0, "b": 2}\n', ":2: expected JSON, got 'b' twice in one object; keep"),
    ("a.jsonl", b'{"a": {"x": [{"b": 1, "b": 1}]}}\n', ":1: expected JSON, got 'b' twice in one object"),
    ("a.json", b'[{"a": 1},\n {"a": {"b": 1, "b": 2}}]', ":2: expected JSON, got 'b' twice in one object"),
    ("a.json", b'[{"a": 1},\n {"a": 1e999}]', ":2: expected JSON, got 1e999"),
    ("a.json", b'[{"a": 1},\n {"a": [1,2}\n]', ":2: expected JSON, got Expecting ',' delimiter at column 12"),
    ("a.json", b'[{"a": 1}, {"a":', ":1: expected JSON, got Expecting value at column 17"),
    ("a.json", b'[{"a": 1}, ]', ":1: expected JSON, got Expecting value at column 12"),
    ("a.json", b'[{"a": 1}', ":1: expected , or ] after the value that begins at"),
    ("a.json", b'[{"a": 1}\n{"a": 2}]', ":2: expected , or ] after the value"),
    ("a.json", b'[{"a": 1}]\n[{"a": 2}]', ":2: expected the end of the file after the array"),
    ("a.json", b'[{"a":\n "\xff"}]', ":2: expected UTF-8 text, got byte 0xff"),
    ("a.json", b'[{"a":\n "\xc3', ":2: expected UTF-8 text, got byte 0xc3"),
]


@pytest.mark.parametrize("window", [3, 1 << 18])
@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_is_wrong_has_its_place_and_no_text(tmp_path, monkeypatch, name, content, message, window):
    monkeypatch.setattr(json_values, "_CHUNK", window)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        objects(path)
    assert f"{path}{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_that_is_too_deep_is_no_crash(tmp_path):
    for name in ("deep.jsonl", "deep.json"):
        path = tmp_path / name
        text = '{"x": ' + "[" * 200_000 + "]" * 200_000 + "}"
        path.write_text(text + "\n" if name == "deep.jsonl" else f"[{text}]")
        with pytest.raises(DataError, match=r":1: expected an object with a few levels"):
            objects(path)


def test_a_line_over_the_limit_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_ROW_BYTES", 100)
    path = tmp_path / "long.jsonl"
    line = json.dumps({"text": "x" * (100 - len('{"text": ""}') - 1)}) + "\n"
    assert len(line) == 100
    path.write_text(line * 2)
    assert len(objects(path)) == 2
    path.write_text(line + line.replace("x", "xx", 1))
    with pytest.raises(DataError, match=r"jsonl:2: expected lines of at most"):
        objects(path)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"x" * (8 << 20)), ("a.json", b'["' + b"x" * (8 << 20))])
def test_a_file_that_is_one_endless_value_takes_no_more_memory_than_a_row_may(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(opening, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_values, "_CHUNK", 500)
    path = tmp_path / name
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="of at most"):
        objects(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_an_array_is_read_in_the_memory_of_a_window(tmp_path):
    path = tmp_path / "array.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join([json.dumps({"text": "y" * 1000})] * 20_000) + "]")  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in read_objects(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "lazy.jsonl"
    path.write_text('{"text": "a"}\nnot JSON\n')
    stream = read_objects(path)
    assert next(stream) == (f"{path}:1", {"text": "a"})
    with pytest.raises(DataError, match=":2:"):
        next(stream)
