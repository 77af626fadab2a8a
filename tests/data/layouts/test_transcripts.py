"""HH transcripts: turns told by their marks, a beginning that is shared or the row is left out."""

import gzip
import json
from pathlib import Path

import pytest

from rlhfjax.data.layouts import named, recognise
from rlhfjax.errors import DataError
from tests.data.layouts.cases import ASKED, BAD, GOOD, USER, read, said

REAL = Path(__file__).parents[4] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
ROW = {
    "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
    "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}",
}


def test_turns_of_a_transcript():
    before = "\n\nHuman: Hello?\n\nAssistant: Yes?\n\nOf course."
    longer = {name: before + text for name, text in ROW.items()}
    history = [{"role": "user", "content": "Hello?"}, said("Yes?\n\nOf course.")]
    rows = [ROW, longer]
    assert recognise(rows, None).name == recognise(rows, "demonstration").name == "hh"
    assert read(rows, "comparison") == [
        {"messages": messages, "responses": [GOOD, BAD], "ranks": [1, 2]} for messages in ([USER], [*history, USER])
    ]
    assert read(rows, "demonstration") == [{"messages": [USER, said(GOOD)]}, {"messages": [*history, USER, said(GOOD)]}]


def test_rows_that_part_earlier_are_left_out_and_said():
    other = {"chosen": ROW["chosen"], "rejected": f"\n\nHuman: What?\n\nAssistant: {BAD}"}
    layout = recognise([ROW, other], "comparison")
    assert layout.rows("comparison", other, "file:2") == []
    assert "differ before their last answer" in layout.omits("comparison")


def test_an_empty_best_answer_is_compared_but_no_demonstration():
    empty = {**ROW, "chosen": f"\n\nHuman: {ASKED}\n\nAssistant:"}
    layout = recognise([ROW, empty], "comparison")
    assert read([empty], "comparison", layout) == [{"messages": [USER], "responses": ["", BAD], "ranks": [1, 2]}]
    assert read([empty], "demonstration", layout) == []
    assert "best response is empty" in layout.omits("demonstration")


@pytest.mark.parametrize("text", ["Hello", f"{GOOD}\n\nHuman: {ASKED}\n\nAssistant: x", f"\n\nHuman: {ASKED}", 3])
def test_what_is_no_transcript(text):
    with pytest.raises(DataError, match="file:4: chosen: expected"):
        named("hh").rows("comparison", {**ROW, "chosen": text}, "file:4")


@pytest.mark.skipif(not REAL.exists(), reason="needs the public file")
def test_the_counts_of_the_public_file():
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 2312
    assert len(read(rows, "comparison", recognise(rows[:100], "comparison"))) == 2307
