"""Rows of conversations: written once by the chat template, and read only by runs that would write them so."""

import datetime
import json
from pathlib import Path

import pytest

from rlhfjax.config import schema
from rlhfjax.data.pipeline import Reader
from rlhfjax.data.tokens.folder import read_index
from rlhfjax.data.tokens.plan import Rows
from rlhfjax.data.tokens.preparing import prepare_tokens
from rlhfjax.errors import DataError
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "tokenizers" / "byte_level"
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DATED = "{{ strftime_now('%Y') }} {% if formal %}sir{% endif %}\n"
DAYS = {"one": datetime.date(2026, 1, 31), "other": datetime.date(2027, 1, 31)}


def speaking(template, day=None, **kwargs):
    described = load_tokenizer(GOLDEN).description | {"chat_template": template + TURNS + BEGIN}
    return HuggingFaceTokenizer(described).with_chat(ChatSettings(kwargs, day))


@pytest.fixture
def chats(tmp_path):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}] * 2
    records = [{"messages": turns[:2]}, {"messages": turns}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def made(chats, tokenizer, name, **more):
    rows = Rows("demonstration", 200, packed=True, **more)
    return prepare_tokens(str(chats / "chats.jsonl"), rows, tokenizer, chats / "data", to=chats / name)


def batches_of(chats, tokenizer, source, train_on="last"):
    reader = Reader(tokenizer, chats / "data", 0)
    return reader.demonstrations([schema.Data(source=str(source))], schema.Batch(size=1, length=200), train_on)


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_conversations_are_written_as_a_run_writes_them(chats, train_on):
    tokenizer = speaking("")
    folder = made(chats, tokenizer, train_on, train_on=train_on)
    files, rows = (batches_of(chats, tokenizer, s, train_on)[0] for s in (chats / "chats.jsonl", folder))
    assert files.tokens.tolist() == rows.tokens.tolist()
    assert files.loss_mask.tolist() == rows.loss_mask.tolist()
    pairs = Reader(tokenizer, chats / "data", 0).demonstration_ids([schema.Data(source=str(folder))], 200, 2)
    assert {tuple(tokenizer.pieces(response)) for _, response in pairs} == {("Me", ".", "<|im_end|>")}
    assert read_index(folder)["counts"]["messages"] == 2


def test_variables_and_a_date_that_is_written_must_be_those_of_the_run(chats):
    folder = made(chats, speaking(DATED, DAYS["one"], formal=True), "dated")
    assert batches_of(chats, speaking(DATED, DAYS["one"], formal=True), folder).rows == 1
    for day, formal in (("other", True), ("one", False)):
        with pytest.raises(DataError, match=f"--template formal={formal} --date {DAYS[day]}`"):
            batches_of(chats, speaking(DATED, DAYS[day], formal=formal), folder)


def test_a_date_that_no_template_writes_does_not_matter(chats):
    folder = made(chats, speaking("", DAYS["one"]), "undated")
    assert batches_of(chats, speaking("", DAYS["other"]), folder).rows == 1


def test_what_a_template_cannot_write_is_an_error_or_dropped(chats):
    refusing = speaking("{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}")
    with pytest.raises(DataError, match=r"chats\.jsonl:2: .*one turn; --refused drop"):
        made(chats, refusing, "refused")
    index = read_index(made(chats, refusing, "dropped", refused="drop"))
    assert (index["counts"]["refused"], index["counts"]["rows"]) == (1, 1)
    assert index["notes"] == ["of 2 records, left out: 1 cannot be written"]
