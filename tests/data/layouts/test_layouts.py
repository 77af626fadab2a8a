"""Recognition of layouts by rule, what is said where nothing fits, mappings, and that no row is ever a traceback."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.layouts import NAMES, mapped, named, recognise
from rlhfjax.data.records import KINDS, parse_record
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.record_kinds import LAYOUTS
from tests.data.layouts.cases import ASKED, BAD, BRIEF, GOOD, USER, read, said

OURS = [
    ("document", {"text": "a", "label": 1}),
    ("demonstration", {"prompt": "p", "completion": "c"}),
    ("demonstration", {"messages": [USER, {**said(GOOD), "weight": 1}], "tools": [{"type": "function"}]}),
    ("comparison", {"prompt": "p", "chosen": "a", "rejected": "b"}),
    ("comparison", {"messages": [USER], "responses": ["a", "b"], "ranks": [1, 1], "labeler_id": "x"}),
    ("prompt", {"prompt": "p", "answer": "a"}),
    ("prompt", {"messages": [USER]}),
    ("unpaired", {"prompt": "p", "completion": "c", "label": False}),
    ("rating", {"output_id": "o", "labeler_id": "l", "likert": 7, "flags": {}}),
]


@pytest.mark.parametrize(("kind", "row"), OURS)
def test_records_of_ours_are_read_as_they_are(kind, row):
    for asked in (kind, None):
        layout = recognise([row], asked)
        assert (layout.name, layout.kinds[0]) == ("rlhfjax", kind)
    assert read([row], kind) == [parse_record(kind, row, "f:1")]
    assert read([row], kind, named("rlhfjax")) == [parse_record(kind, row, "f:1")]


def test_what_follows_from_records_of_ours():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read([pair], "demonstration") == [{"prompt": "p", "completion": "a"}]
    ranked = {"messages": [USER], "responses": ["a", "b", "c"], "ranks": [3, 1, 1]}
    assert read([ranked], "demonstration") == [{"messages": [USER, said("b")]}]
    assert read([{"messages": [USER, said(GOOD)]}], "prompt") == [{"messages": [USER]}]
    labelled = [{"prompt": "p", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    assert recognise(labelled, "demonstration").kinds[0] == "unpaired"
    assert read(labelled, "demonstration") == [{"prompt": "p", "completion": "good"}]


def test_prompts_of_ours_keep_what_stands_beside_them():
    for beside in ({"completion": "c"}, {"chosen": "a", "rejected": "b"}, {"answer": "42"}):
        assert read([{"prompt": "p", **beside}], "prompt") == [{"prompt": "p", "extra": beside}]


def test_most_rows_decide_and_the_first_in_the_table_where_as_many_fit():
    alpaca, dolly = {"instruction": ASKED, "output": GOOD}, {"instruction": ASKED, "response": GOOD}
    assert recognise([alpaca, dolly, dolly], "demonstration").name == "dolly"
    assert (
        recognise([alpaca, dolly], "demonstration").name == recognise([dolly, alpaca], "demonstration").name == "alpaca"
    )


def test_unread_fields_are_those_that_mean_something():
    row = {
        "instruction": ASKED,
        "output": GOOD,
        "images": ["a"],
        "label": 1,
        "category": "x",
        "score": None,
        "context": "",
    }
    assert recognise([row], "demonstration").unread("demonstration", row) == {"images", "label"}
    ours = {"prompt": "p", "completion": "c", "history": [["a", "b"]], "tools": [{"type": "function"}]}
    assert recognise([ours], "demonstration").unread("demonstration", ours) == {"history"}
    assert recognise([row], "demonstration").unread("demonstration", {"output": 3}) == set()


def test_a_file_that_nothing_fits_names_its_fields_and_the_nearest_layouts():
    with pytest.raises(DataError) as error:
        recognise([{"instruction": ASKED, "reply": GOOD}], "demonstration")
    assert "got the fields instruction, reply" in str(error.value)
    assert "alpaca: instruction, input, output" in str(error.value)
    assert "--map" in str(error.value)
    with pytest.raises(DataError, match="expected rows of a known layout"):
        recognise([], None)
    with pytest.raises(DataError, match="expected rows of a known layout"):
        recognise(["text", 3], None)


def test_a_file_with_a_field_of_ours_is_judged_row_by_row():
    assert recognise([{"prompt": "p", "completions": "c"}], "demonstration").name == "rlhfjax"
    with pytest.raises(DataError, match=r"file:1: completion: expected this field .*is 'completions' meant"):
        read([{"prompt": "p", "completions": "c"}], "demonstration")


def test_names():
    assert "rlhfjax" in NAMES
    assert "safe_rlhf_safer" in NAMES
    assert [named(name).name for name in NAMES] == list(NAMES) == list(LAYOUTS)
    for name in NAMES:
        for kind in named(name).kinds:
            assert named(name).explain(kind)
            assert "\n" not in named(name).explain(kind) + named(name).omits(kind)
    with pytest.raises(ConfigError, match="alpaca, alpaca_kto"):
        named("alpacca")
    with pytest.raises(ConfigError, match="alpaca gives demonstration or prompt records, not comparison"):
        named("alpaca").rows("comparison", {}, "f:1")


def test_the_table_of_layouts_in_the_documents():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.partition("| layout | fields | gives |")[2].partition("\n\n")[0]
    named_there = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert [name for names in named_there for name in names] == list(NAMES)


def test_a_mapping_of_fields():
    row = {"q": {"text": "p"}, "a.b": " c", "id": 7}
    layout = mapped({"prompt": "q.text", "completion": "a.b", "prompt_id": "id"})
    assert layout.kinds == ("demonstration", "prompt")
    assert layout.explain("demonstration") == "q.text → prompt, a.b → completion, id → prompt_id"
    assert read([row], "demonstration", layout) == [{"prompt": "p", "completion": " c", "prompt_id": "7"}]
    assert read([row | {"beside": 1}], "prompt", layout)[0]["prompt"] == "p"
    with pytest.raises(
        DataError, match=r"file:1: q\.text: expected the field 'text' that --map names, got the fields txt"
    ):
        read([{"q": {"txt": "p"}, "a.b": "c"}], "demonstration", layout)


def test_a_mapping_onto_messages():
    row = {"dialog": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GOOD}], "sys": "Be brief."}
    layout = mapped({"messages": "dialog", "system": "sys"})
    assert read([row], "demonstration", layout) == [{"messages": [BRIEF, USER, said(GOOD)]}]
    assert read([{"dialog": row["dialog"]}], "demonstration", layout) == [{"messages": [USER, said(GOOD)]}]
    pair = {"q": [USER], "better": [said(GOOD)], "worse": [said(BAD)]}
    layout = mapped({"prompt": "q", "chosen": "better", "rejected": "worse"})
    assert read([pair], "comparison", layout) == [{"messages": [USER], "responses": [GOOD, BAD], "ranks": [1, 2]}]
    assert read([pair], "demonstration", layout) == [{"messages": [USER, said(GOOD)]}]


def test_mappings_that_make_up_no_record():
    with pytest.raises(ConfigError, match="--map promt=q: expected a field of ours"):
        mapped({"promt": "q"})
    with pytest.raises(ConfigError, match="expected the fields of a record kind"):
        mapped({"prompt_id": "q"})


NAMES_OF_FIELDS = [
    *sorted({word for name in NAMES for word in named(name).fields.replace(",", " ").split()}),
    *("system", "tools", "history", "role", "content", "from", "value", "text", "replies", "user_id", "result", "type"),
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(["", " ", "a", "user", "human", "b a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES_OF_FIELDS), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(NAMES_OF_FIELDS), VALUES, max_size=6)


@settings(max_examples=300, deadline=None)
@given(row=ROWS, name=st.sampled_from(NAMES), kind=st.sampled_from(KINDS))
def test_no_row_is_a_traceback(row, name, kind):
    with contextlib.suppress(DataError):
        recognise([row], kind)
    layout = named(name)
    if kind in layout.kinds:
        assert isinstance(layout.unread(kind, row), set)
        with contextlib.suppress(DataError):
            for where, tree in layout.gathered([("f:1", row)]):
                for obj in layout.rows(kind, tree, where):
                    parse_record(kind, obj, where)
