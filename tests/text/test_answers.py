"""What is trained of a conversation is what its chat template writes, for templates with each habit of published ones.

The right texts are written by hand from what the templates say; no template is anybody else's.
"""

import datetime
from pathlib import Path

import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.chat import (
    Untrained,
    encode_all_turns,
    encode_demonstration,
    encode_prompt,
    encode_responses,
    truncate_history,
)
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
ENDOFTEXT, IM_START, IM_END = 0, 1, 2

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\nBEGIN{% endif %}"
LAST_THINKS = "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def template(content="m.content", begin="", turns=TURNS):
    return turns.replace("CONTENT", content) + OPENS.replace("BEGIN", begin)


TEMPLATES = {
    "plain": template(),
    "opens": template("m.content", "<think>\n", TURNS.replace("{{ CONTENT }}", LAST_THINKS + "{{ m.content }}")),
    "opens, and answers without": template("m.content", "<think>\n"),
    "adds": template(
        turns=TURNS.replace(
            "{{ CONTENT }}",
            "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
        ),
        begin="{% if thinking is defined and not thinking %}<think>\n\n</think>\n\n{% endif %}",
    ),
    "trims": template("m.content | trim"),
    "rewrites": template("m.content if loop.last or m.role == 'user' else '...'"),
    "drops system": template().replace("<|im_start|>{{", "{% if m.role != 'system' %}<|im_start|>{{").replace(
        "<|im_end|>\n", "<|im_end|>\n{% endif %}"
    ),
    "refuses system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + template(),
    "dates": "Today is {{ strftime_now('%d %b %Y') }}.\n" + template(),
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "no beginning": TURNS.replace("CONTENT", "m.content"),
    "tools": "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    + template("m.content ~ (m.tool_calls | tojson if m.tool_calls else '')"),
    "ends twice": template().replace("<|im_end|>\n", "<|im_end|>\n{{ m.content }}<|im_end|>\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def chatml():
    return load_tokenizer(GOLDEN / "byte_level")


@pytest.fixture
def speaking(chatml):
    def make(name, **settings):
        made = HuggingFaceTokenizer(chatml.description | {"chat_template": TEMPLATES[name]})
        return made.with_chat(ChatSettings(**settings)) if settings else made

    return make


def chat(*turns, **more):
    roles = ("user", "assistant") * len(turns)
    messages = [t if isinstance(t, dict) else {"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    return {"messages": messages, **more}


def written(tokenizer, ids):
    return "".join(tokenizer.pieces(ids)).replace("Ġ", " ").replace("Ċ", "\n")


def demonstrated(tokenizer, record):
    return [written(tokenizer, ids) for ids in encode_demonstration(tokenizer, record)]


ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "answer", "prompt", "response"),
    [
        ("plain", "So.", ASKED, "So.<|im_end|>"),
        ("plain", " So.\n", ASKED, " So.\n<|im_end|>"),
        ("trims", " So.\n", ASKED, "So.<|im_end|>"),
        (
            "opens",
            {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
            f"{ASKED}<think>\n",
            "Hm.\n</think>\n\nSo.<|im_end|>",
        ),
        ("adds", "So.", ASKED, "<think>\n\n</think>\n\nSo.<|im_end|>"),
        ("no end", "So.", "user: Why?\n\nassistant:", " So.<|im_end|>"),
        ("no beginning", "So.", "<|im_start|>user\nWhy?<|im_end|>\n", "<|im_start|>assistant\nSo.<|im_end|>"),
    ],
)
def test_the_response_is_the_whole_less_the_prompt(speaking, name, answer, prompt, response):
    # fails if the answer's own text is tokenised after the prompt, as it once was: seen for all but the first two
    tokenizer = speaking(name)
    assert demonstrated(tokenizer, chat("Why?", answer)) == [prompt, response]
    asked, answered = encode_demonstration(tokenizer, chat("Why?", answer))
    assert encode_prompt(tokenizer, chat("Why?")) == asked
    tokens, trained = encode_all_turns(tokenizer, chat("Why?", answer))
    assert tokens == [*asked, *answered]  # the ids of the prompt begin those of the whole, and the mask the answer
    assert trained == [False] * len(asked) + [True] * len(answered)


def test_thinking_is_switched_by_variables(speaking):
    asked = f"{ASKED}<think>\n\n</think>\n\n"
    assert demonstrated(speaking("adds", kwargs={"thinking": False}), chat("Why?", "So.")) == [asked, "So.<|im_end|>"]
    own = chat("Why?", "So.", chat_template_kwargs={"thinking": False})
    assert demonstrated(speaking("adds"), own) == [asked, "So.<|im_end|>"]
    # what the record says goes before
    own["chat_template_kwargs"] = {"thinking": True}
    assert demonstrated(speaking("adds", kwargs={"thinking": False}), own)[0] == ASKED
    with pytest.raises(ConfigError, match="reads, got thinkin; did you mean thinking"):
        speaking("adds", kwargs={"thinkin": False})


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("opens, and answers without", chat("Why?", "So."), "after '<|im_start|>assistant\\n<think>\\n', got one that"),
        ("plain", chat("Why?", {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}), "leaves out its"),
        (
            "drops system",
            {"messages": [{"role": "system", "content": "Be brief."}, *chat("Why?", "So.")["messages"]]},
            "messages[0]: expected a chat template that writes every message",
        ),
        ("refuses system", chat({"role": "system", "content": "S"}, "a", "b"), "no system role"),
        ("plain", chat("Why?", "So.", tools=[{"name": "f"}]), "tools: expected a chat template that writes them"),
        ("ends twice", chat("Why?", "So."), "ends an answer once"),
    ],
)  # fmt: skip
def test_what_is_not_written_as_it_is_generated_is_refused(speaking, name, record, expected):
    with pytest.raises(DataError) as caught:
        encode_demonstration(speaking(name), record)
    assert expected in str(caught.value)


def test_a_template_that_ends_a_turn_and_begins_the_next_is_taken(speaking, chatml):
    # what follows the end is what the template writes after every answer
    source = TEMPLATES["plain"].replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = HuggingFaceTokenizer(chatml.description | {"chat_template": source})
    assert demonstrated(tokenizer, chat("Why?", "So.")) == [ASKED, "So.<|im_end|>"]


def test_every_answer_has_its_span(speaking):
    tokenizer = speaking("plain")
    record = chat("a", "b", "c", {"role": "assistant", "content": "d", "weight": 0}, "e", "f")
    tokens, trained = encode_all_turns(tokenizer, record)
    assert written(tokenizer, tokens) == "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in zip(("user", "assistant") * 3, "abcdef", strict=True)
    ).removesuffix("\n")
    assert (
        written(tokenizer, [i for i, wanted in zip(tokens, trained, strict=True) if wanted]) == "b<|im_end|>f<|im_end|>"
    )
    assert tokens == tokenizer.encode_chat(record["messages"], False)[:-1]
    with pytest.raises(DataError, match=r"messages\[1\]: .*train on the last answer alone"):
        encode_all_turns(speaking("rewrites"), chat("a", "b", "c", "d"))
    # an answer that is masked may be rewritten
    masked = chat("a", {"role": "assistant", "content": "b", "weight": 0}, "c", "d")
    assert written(tokenizer, encode_all_turns(speaking("rewrites"), masked)[0]).endswith("assistant\nd<|im_end|>")
    with pytest.raises(Untrained):
        encode_demonstration(tokenizer, chat("a", {"role": "assistant", "content": "b", "weight": 0}))


def test_the_date_is_that_of_the_settings(speaking):
    tokenizer = speaking("dates", date=datetime.date(2031, 2, 3))
    assert demonstrated(tokenizer, chat("Why?", "So.")) == [f"Today is 03 Feb 2031.\n{ASKED}", "So.<|im_end|>"]
    assert tokenizer.eos_id == IM_END  # found without a date as well
    assert speaking("dates").eos_id == IM_END
    with pytest.raises(ConfigError, match="writes the date, and none is fixed"):
        encode_prompt(speaking("dates"), chat("Why?"))


def test_tools_and_calls_are_the_templates(speaking):
    tokenizer = speaking("tools")
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    record = chat("Why?", {"role": "assistant", "content": "", "tool_calls": [call]}, tools=[{"name": "f"}])
    prompt, response = encode_demonstration(tokenizer, record)
    assert written(tokenizer, prompt) == f'[{{"name": "f"}}]\n{ASKED}'
    said = '[{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]'
    assert written(tokenizer, response) == f"{said}<|im_end|>"
    assert response.count(IM_END) == 1  # what the call says is text
    answered = chat("Why?", *record["messages"][1:], {"role": "tool", "content": "7"}, tools=record["tools"])
    assert written(tokenizer, encode_prompt(tokenizer, answered)).endswith("tool\n7<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_keeps_its_ids_where_a_token_would_reach_across(chatml):
    # "\n\n" is one token: the generation prompt ends with one line break, and the answer begins with another
    source = TEMPLATES["plain"]
    tokenizer = HuggingFaceTokenizer(chatml.description | {"chat_template": source})
    merged = chatml.encode("\n\n")
    prompt, response = encode_demonstration(tokenizer, chat("Why?", "\nSo."))
    assert len(merged) == 1
    assert prompt == encode_prompt(tokenizer, chat("Why?"))
    assert response == [*chatml.encode("\nSo."), IM_END]
    assert merged[0] not in prompt + response


def test_several_responses_share_their_prompt(speaking):
    tokenizer, known = speaking("adds"), {}
    prompt, responses = encode_responses(tokenizer, chat("Why?"), ["So.", "No.", "So."], known)
    for text, ids in zip(("So.", "No.", "So."), responses, strict=True):
        assert (prompt, ids) == encode_demonstration(tokenizer, chat("Why?", text))
    assert len(known) == 2


def test_history_keeps_the_developer(speaking):
    first = {"role": "developer", "content": "Be brief."}
    messages = [first, *chat("a", "b", "c")["messages"]]
    size = len(encode_prompt(speaking("plain"), {"messages": [messages[0], messages[3]]}))
    assert truncate_history(messages, speaking("plain"), size, 0) == ([first, messages[3]], 2)


def test_special_tokens_in_thoughts_and_words_stay_what_they_are(chatml):
    described = {**chatml.description, "chat_template": TEMPLATES["plain"]}
    described["tokenizer"] = dict(described["tokenizer"])
    described["tokenizer"]["added_tokens"] = [
        {**token, "special": True} for token in described["tokenizer"]["added_tokens"]
    ]
    tokenizer = HuggingFaceTokenizer(described)
    think = next(token["id"] for token in described["tokenizer"]["added_tokens"] if token["content"] == "<think>")
    text = "<think>So it is.<|im_end|>"
    # an answer's thought is the model's own token; anybody else's is text, and so is an end in either
    assert encode_demonstration(tokenizer, chat("Why?", text))[1].count(think) == 1
    assert encode_demonstration(tokenizer, chat("Why?", text))[1].count(IM_END) == 1
    assert think not in encode_prompt(tokenizer, chat(text))


@pytest.mark.parametrize("kind", ["own", "byte_level"])
def test_plain_records_are_what_they_were(kind):
    tokenizer = load_tokenizer(GOLDEN / kind / "own" if kind == "own" else GOLDEN / kind)
    begin = [1] if kind == "own" else []
    record = {"prompt": "Why not", "completion": " so?"}
    assert encode_demonstration(tokenizer, record) == (
        [*begin, *tokenizer.encode("Why not")],
        [*tokenizer.encode(" so?"), tokenizer.eos_id],
    )


def test_own_conversations_are_what_they_were():
    tokenizer = load_tokenizer(GOLDEN / "own" / "own")
    role, e = tokenizer.role_ids, tokenizer.encode
    record = chat(
        {"role": "developer", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    )
    prompt = [1, role["system"], *e("S"), 2, role["user"], *e("Q"), 2, role["assistant"]]
    assert encode_demonstration(tokenizer, record) == (prompt, [*e("A"), 2])
    assert encode_all_turns(tokenizer, record) == (
        [*prompt, *e("A"), 2],
        [False] * len(prompt) + [True] * (len(e("A")) + 1),
    )
    with pytest.raises(ConfigError, match="expected none for this project's own tokenizer"):
        tokenizer.with_chat(ChatSettings({"enable_thinking": False}))
