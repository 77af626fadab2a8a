"""Files to records: the layout is recognised or asked for, wrong rows are counted, what nobody reads is said."""

import json

import pytest

from rlhfjax.data import reading
from rlhfjax.data.datasets import fingerprint, open_source
from rlhfjax.data.preparing import prepare_files, prepare_source, what_was_made
from rlhfjax.data.reading import Tally, data_file, read_records
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.record_kinds import Reading, reading_of

ALPACA = [
    {"instruction": "Say it.", "input": "Blue.", "output": "Blue."},
    {"instruction": "What is it?", "input": "", "output": "Green."},
]


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(path, kind, how=reading.RECOGNISE):
    with pytest.raises((DataError, ConfigError)) as error:
        list(read_records(path, kind, how))
    return str(error.value)


def test_the_first_wrong_row_and_the_number_of_all(tmp_path):
    good = {"text": "a"}
    path = lines(
        tmp_path / "a.jsonl", good, {"text": 1}, good, "{", '{"text": "a", "text": "b"}', {"txt": 2}, "[]", good
    )
    first, more = refused(path, "document").split("\n")
    assert first == f"{path}:2: text: expected a string, got a whole number"
    assert more == "… and 4 more wrong rows of 8"
    assert refused(lines(path, good, {"text": 1}), "document").endswith("\n… and no other wrong row of 2")
    assert "\n" not in refused(lines(path, {"text": 1}), "document")


def test_counting_ends_where_nothing_more_can_be_read_and_after_enough(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('[{"text": 1}, {"text": 2}, {"text": "c"}, {"text": }]')
    assert refused(path, "document").endswith("\n… and 1 more wrong row of the first 3")
    monkeypatch.setattr(reading, "_COUNTED", 2)
    rows = [{"text": 1}] * 5
    assert refused(lines(tmp_path / "b.jsonl", *rows), "document").endswith("… and 2 more wrong rows of the first 3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one document, got an empty file"),
        ("\r\n \n", "expected at least one document, got an empty file"),
        ('"b"\n', ":1: expected an object with the fields of a document, got a string"),
        ('{"text": "a\\ud800"}\n', ":1: text: expected Unicode text"),
        ('{"text": "a\\u0000"}\n', ":1: text: expected text, got a NUL"),
        ('{"text": "a", "x": ' + "[" * 200 + "]" * 200 + "}\n", ":1: expected"),
    ],
)
def test_files_without_a_record(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert message in refused(path, "document")


def test_errors_never_quote_the_text(tmp_path):
    path = lines(tmp_path / "private.jsonl", {"prompt": "SECRET", "completion": ["SECRET"]})
    assert "SECRET" not in refused(path, "demonstration")
    assert "SECRET" not in refused(lines(path, {"question": "SECRET"}), "comparison")


def test_an_unknown_layout_names_file_format_and_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("zzz,yyy\n1,2\n")
    message = refused(path, "demonstration")
    assert message.startswith(
        f"{path} (CSV): expected rows of a layout that gives demonstration records, got the fields"
    )
    assert "yyy, zzz" in message


def test_a_layout_is_recognised_or_asked_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ALPACA))
    file = data_file(path, None)
    assert (file.kind, file.layout.name) == ("demonstration", "alpaca")
    assert file.words().startswith("JSON, layout alpaca: ")
    assert "instruction" in file.words()
    made = list(read_records(path, "demonstration"))
    assert made[1]["messages"][0]["content"] == "What is it?"
    assert made[1]["messages"][1]["content"] == "Green."
    own = refused(path, "demonstration", Reading("rlhfjax"))
    assert own.startswith(
        f"{path}:1: prompt: expected this field in a demonstration, got the fields input, instruction"
    )
    swapped = reading_of(None, {"prompt": "output", "completion": "instruction"})
    assert [record["prompt"] for record in read_records(path, "demonstration", swapped)] == ["Blue.", "Green."]
    assert "expected a layout that gives a comparison, got alpaca" in refused(path, "comparison", Reading("alpaca"))
    for wrong in ({"layout": "alpacca"}, {"layout": "alpaca", "map": (("prompt", "output"),)}, {"sample_by": "word"}):
        with pytest.raises(ConfigError):
            Reading(**wrong)


def test_another_reading_is_another_dataset(tmp_path):
    path, data_dir = lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b", "q": "c"}), tmp_path / "data"
    other = reading_of(None, {"prompt": "q", "completion": "completion"})
    folders = [prepare_source(path, "demonstration", data_dir, how) for how in (reading.RECOGNISE, other)]
    assert len(set(folders)) == 2
    assert folders == [prepare_source(path, "demonstration", data_dir, how) for how in (reading.RECOGNISE, other)]
    prompts = [
        open_source(str(path), "train", data_dir, "demonstration", how)[0]["prompt"] for how in (Reading(), other)
    ]
    assert prompts == ["a", "c"]
    prints = {fingerprint(str(path), "train", data_dir, "demonstration", how) for how in (Reading(), other)}
    assert len(prints) == 2
    prepare_files({"train": path}, "demonstration", "mine", data_dir)
    with pytest.raises(DataError, match="read in another way"):
        prepare_files({"train": path}, "demonstration", "mine", data_dir, reading=other)


def test_plain_lines_have_the_name_that_they_always_had(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "a"})
    folder = prepare_source(path, "document", tmp_path / "data")
    assert folder.parent.name == "jsonl_document_7c24616314d4c7ddcc755cd2"  # of sha256sum
    text = tmp_path / "a.txt"
    text.write_text("a\n\nb")
    names = {prepare_source(text, "document", tmp_path / "data", Reading(sample_by=by)) for by in ("line", "document")}
    assert len(names) == 2


def test_shards_of_a_folder_are_splits(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    for name, text in [("train-1.jsonl", "a"), ("train-2.jsonl", "b"), ("test.jsonl", "c"), ("notes.jsonl", "d")]:
        lines(root / name, {"text": text})
    assert [row["text"] for row in open_source(str(root), "train", tmp_path / "data", "document")] == ["a", "b"]
    test = open_source(str(root), "test", tmp_path / "data", "document")
    assert [row["text"] for row in test] == ["c"]
    assert test.notes == ["files whose names say no split, left out: notes.jsonl"]
    with pytest.raises(DataError, match="expected a split among train, test, got 'validation'"):
        open_source(str(root), "validation", tmp_path / "data", "document")


def test_what_was_made_is_said_in_words(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*ALPACA, {**ALPACA[1], "images": ["x.png"]}]))
    folder = prepare_files({"train": [path], "validation": [path]}, "prompt", "mine", tmp_path / "data")
    said = "\n".join(what_was_made(folder, "mine"))
    assert "train: a.json: JSON, layout alpaca: " in said
    assert "fields that no model reads, though a reward may, with their rows of 3: images (1)" in said
    assert "mine: prompt records: 3 in train, 3 in validation" in said
    assert "`rlhfjax data inspect mine@train`" in said
    assert "{source: mine}" in said


def test_a_tally_adds_up():
    one, two = Tally(5, 3, 2), Tally(1, 1)
    one.unread.update(["label"])
    two.unread.update(["label", "system"])
    assert list((one + two).words("unpaired", "those without a user")) == [
        "2 of 6 rows gave no unpaired, left out: those without a user",
        "fields that no stage reads, with their rows of 6: label (2), system (1)",
    ]


@pytest.mark.parametrize("name", ["documents.jsonl", "data"])
def test_a_file_wins_over_a_dataset_of_its_first_name(tmp_path, monkeypatch, name):
    """`data_dir: .` beside a folder data/, which is asked for the version of a dataset `data` with a configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "documents.jsonl", {"text": "a"})
    source = "data" if name == "data" else f"data/{name}"
    assert open_source(source, "train", ".", "document")[0] == {"text": "a"}


def test_a_dataset_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    prepare_files({"train": lines(tmp_path / "mine" / "a.jsonl", {"text": "a"})}, "document", "mine", tmp_path / "data")
    lines(tmp_path / "mine" / "a.jsonl", {"text": "b"})
    assert open_source("mine", "train", tmp_path / "data", "document")[0] == {"text": "a"}
    assert open_source("./mine", "train", tmp_path / "data", "document")[0] == {"text": "b"}
