"""The dialogue filters on exchanges worked by hand, one rule at a time, and where conversations are cut."""

import json
import zipfile
from collections import Counter

import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.data.datasets import open_source
from rlhfjax.data.dialogue import DialogueFilter, count_exchanges, filtered_sessions
from rlhfjax.data.records import parse_record
from rlhfjax.data.sets.chitchat import MAX_MESSAGES, Chitchat

from .conftest import conversations

GOOD = "i think that it was the best day of the year"


# Each case fails when its rule is taken out: seen for all seven.
@pytest.mark.parametrize(
    ("message", "answer", "reason"),
    [
        ("how are you", GOOD, None),
        ("look at http://x.org/y", GOOD, "a web address"),
        ("how are you", "see www.example", "a web address"),
        ("how are you", "it is on films.com now", "a web address"),
        ("is 3.5 a good rating", "it is. the rest is not", None),
        ("how are you", "no no No not that", "a word three times in a row"),
        ("no no no", GOOD, None),  # the rule is about answers
        ("how are you", "no, it is no, no", None),  # three times, not in a row
        ("comment allez vous", "bonjour mademoiselle", "none of the fifty most frequent words"),
        ("how are you", "", "none of the fifty most frequent words"),
        ("how are you", "the end [deleted]", "a bracket (markup)"),
        ("[photo] what is it", GOOD, None),
        ("a " * 100, "the cat and dog " * 25, None),
        ("a " * 101, "the cat and dog " * 25, "more than 200 words"),
        ("how are you", "that is bullshit", "an offensive word"),
        ("fuck you", "that is not nice", "an offensive word"),
        ("how are you", "i went to scunthorpe and the class", None),  # words, not parts of words
    ],
)
def test_one_rule_at_a_time(message, answer, reason):
    assert DialogueFilter().reason(message, answer) == reason


def test_answers_of_common_phrases_alone_are_rejected():
    bland, rare = "i do not know what you mean", "i do not know the capital of mali"
    rules = DialogueFilter.of([bland] * 11 + [rare], seen=10)
    assert rules.common == {tuple(bland.split()[i : i + 3]) for i in range(5)}
    assert rules.reason("why", bland) == "nothing but common phrases"
    assert rules.reason("why", rare) is None  # 2 of its 6 trigrams are common
    assert rules.reason("why", "i do") is None  # without a trigram there is nothing to count
    nine_of_ten = DialogueFilter(common=frozenset(zip("abcdefghijk", "bcdefghijkl", "cdefghijklm", strict=True)))
    assert nine_of_ten.reason("x", "a b c d e f g h i j k z") == "nothing but common phrases"  # 9 of 10
    assert nine_of_ten.reason("x", "a b c d e f g h i j z z") is None  # 8 of 10


def talk(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def contents(pieces):
    return [[message["content"] for message in piece] for piece in pieces]


def test_a_conversation_is_cut_where_an_exchange_is_rejected():
    counts = Counter()
    messages = talk("q1", "the a1", "q2", "[x]", "q3", "the a3", "q4", "hm", "q5", system="be kind")
    pieces = list(filtered_sessions(messages, DialogueFilter(), counts))
    assert contents(pieces) == [["be kind", "q1", "the a1"], ["be kind", "q3", "the a3"]]
    assert [message["role"] for message in pieces[1]] == ["system", "user", "assistant"]
    assert counts == {"none of the fifty most frequent words": 2}  # "[x]" breaks this rule first
    assert list(filtered_sessions([], DialogueFilter(), counts)) == []


def test_calls_of_tools_are_no_answers_to_judge():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "warmth", "arguments": {}}}]}
    warm, bad = {"role": "tool", "content": "21"}, {"role": "assistant", "content": "[x]"}
    asked, good = talk("how warm is it", "it is 21")
    counts = Counter()
    assert list(filtered_sessions([asked, call, warm, good], DialogueFilter(), counts)) == [[asked, call, warm, good]]
    assert counts == {}
    after = {"role": "developer", "content": "be kind"}
    pieces = list(filtered_sessions([after, asked, bad, warm, good, asked, good], DialogueFilter(), counts))
    assert pieces == [[after, asked, good]]
    assert count_exchanges([after, asked, call, warm, good]) == 1


def test_long_conversations_become_pieces_of_whole_exchanges():
    messages = talk(*(f"the turn {i}" for i in range(11)))
    pieces = contents(filtered_sessions(messages, DialogueFilter(), Counter(), 5))
    assert pieces == [[f"the turn {i}" for i in part] for part in ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))]
    pieces = contents(filtered_sessions(messages, DialogueFilter(), Counter(), 6))
    assert [len(piece) for piece in pieces] == [6, 4]


def test_prepared_with_filters_and_a_report(tmp_path):
    records = [
        {"prompt": "how are you", "completion": GOOD},
        {"prompt": "how are you", "completion": "[gone]"},
        {"messages": talk("hello", "the cat", "so", "that darn dog", "ok", "is it")},
    ]
    file, words = tmp_path / "chats.jsonl", tmp_path / "words.txt"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    words.write_text("Darn\n")
    base = ["data", "prepare", "chats", "--kind", "demonstration", "--split", f"train={file}", "--dialogue-filters"]
    result = CliRunner().invoke(app, [*base, "--blocklist", str(words), "--data-dir", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert "3 of 5 exchanges kept" in result.stderr
    assert "        1  20.00%  an offensive word" in result.stderr
    kept = list(open_source("chats", "train", tmp_path / "made", "demonstration"))
    assert kept[0]["completion"] == GOOD
    assert [contents([record["messages"]])[0] for record in kept[1:]] == [["hello", "the cat"], ["ok", "is it"]]
    other = CliRunner().invoke(app, [*base, "--data-dir", str(tmp_path / "made")])
    assert other.exit_code == 3  # the same name, other words
    file.write_text(json.dumps(records[1]) + "\n")
    refused = CliRunner().invoke(app, [*base, "--data-dir", str(tmp_path / "other")])
    assert refused.exit_code == 3
    assert "expected an exchange that passes the filters, got none" in refused.output


def test_chitchat_sessions_and_prompts(tmp_path):
    chats = conversations()
    for chat in chats.values():
        for message in (message for turn in chat["messages"] for message in turn):
            message["text"] += " of the day" if message["text"].strip() else ""
    with zipfile.ZipFile(tmp_path / "chats.whl", "w") as archive:
        archive.writestr("chitchat_dataset/dataset.json", json.dumps(chats))
    tables = Chitchat.compute(tmp_path / "chats.whl")
    for split in ("train", "validation"):
        for record in tables["sessions"][split]():
            messages = record["messages"]
            assert parse_record("demonstration", record, "here") == record
            assert [m["role"] for m in messages] == [("user", "assistant")[i % 2] for i in range(len(messages))]
            assert len(messages) <= MAX_MESSAGES
    sessions, prompts = (list(tables[name]["train"]()) for name in ("sessions", "prompts"))
    assert len(sessions) == len(prompts) > 0
    for session, prompt in zip(sessions, prompts, strict=True):
        assert parse_record("prompt", prompt, "here") == prompt
        assert prompt["messages"][-1]["role"] == "user"
        assert session["messages"][: len(prompt["messages"])] == prompt["messages"]
        assert session["messages"][len(prompt["messages"])]["role"] == "assistant"
