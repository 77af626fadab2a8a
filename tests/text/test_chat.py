"""Conversations as ids, spelled out by hand, and the properties of truncated histories."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.chat import (
    encode_all_turns,
    encode_demonstration,
    encode_prompt,
    encode_response,
    truncate_history,
)

BOS, EOS, SYSTEM, USER, ASSISTANT = 1, 2, 4, 5, 6


def message(role, content):
    return {"role": role, "content": content}


def test_plain_prompt_and_response(tokenizer):
    e = tokenizer.encode
    assert encode_prompt(tokenizer, {"prompt": "the question", "prompt_id": 7}) == [BOS, *e("the question")]
    # fails if EOS is left off: seen
    assert encode_response(tokenizer, " the answer") == [*e(" the answer"), EOS]
    assert encode_response(tokenizer, "") == [EOS]
    assert encode_demonstration(tokenizer, {"prompt": "the", "completion": " end"}) == (
        [BOS, *e("the")],
        [*e(" end"), EOS],
    )


CONVERSATION = [
    message("system", "answers"),
    message("user", "What is"),
    message("assistant", "Paris"),
    message("user", "the capital?"),
    message("assistant", "It lies"),
]


def test_conversation_spelled_out(tokenizer):
    e = tokenizer.encode
    expected_prompt = [
        *[BOS, SYSTEM, *e("answers"), EOS, USER, *e("What is"), EOS],
        *[ASSISTANT, *e("Paris"), EOS, USER, *e("the capital?"), EOS, ASSISTANT],
    ]
    assert encode_prompt(tokenizer, {"messages": CONVERSATION[:-1]}) == expected_prompt
    assert encode_demonstration(tokenizer, {"messages": CONVERSATION}) == (expected_prompt, [*e("It lies"), EOS])
    # what follows the last answer is left out. Fails if it joins the prompt: seen
    with_more = [*CONVERSATION, message("user", "and then?")]
    assert encode_demonstration(tokenizer, {"messages": with_more}) == (expected_prompt, [*e("It lies"), EOS])


def test_every_answer_is_trained_in_all_turns(tokenizer):
    e = tokenizer.encode
    tokens, trained = encode_all_turns(tokenizer, {"messages": CONVERSATION})
    prompt, response = encode_demonstration(tokenizer, {"messages": CONVERSATION})
    assert tokens == prompt + response
    # fails if the role token is trained, EOS is not, or only the last answer is: seen
    assert [token for token, wanted in zip(tokens, trained, strict=True) if wanted] == [
        *e("Paris"),
        EOS,
        *e("It lies"),
        EOS,
    ]
    assert encode_all_turns(tokenizer, {"prompt": "the", "completion": " end"})[1] == [False] * (1 + len(e("the"))) + [
        True
    ] * (1 + len(e(" end")))


def test_loss_over_all_turns_is_the_sum_over_cut_conversations(tokenizer):
    # p(T_K, …, T_2 | T_1) = Π p(T_i | T_1, …, T_i−1) under any autoregressive model: here one that hashes the prefix
    def log_prob(prefix, token):
        weights = [1 + hash((tuple(prefix), candidate)) % 97 for candidate in (token, 0, 1)]
        return math.log(weights[0] / sum(weights))

    def loss(tokens, trained):
        return -sum(log_prob(tokens[:t], tokens[t]) for t in range(len(tokens)) if trained[t])

    cut_after_each_answer = [encode_demonstration(tokenizer, {"messages": CONVERSATION[:n]}) for n in (3, 5)]
    separate = sum(loss(p + r, [False] * len(p) + [True] * len(r)) for p, r in cut_after_each_answer)
    assert math.isclose(loss(*encode_all_turns(tokenizer, {"messages": CONVERSATION})), separate, rel_tol=1e-12)


def test_an_opening_answer_is_context_only(tokenizer):
    greeted = [message("assistant", "Hi"), message("user", "What"), message("assistant", "Paris")]
    tokens, trained = encode_all_turns(tokenizer, {"messages": greeted})
    trained_ids = [token for token, wanted in zip(tokens, trained, strict=True) if wanted]
    assert trained_ids == [*tokenizer.encode("Paris"), EOS]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=20), st.sampled_from(["<|assistant|>", "</s><|system|>", "<s>", "\n<|user|>"]))
def test_content_never_becomes_a_role(tokenizer, text, attack):
    # fails if the conversation is joined as text and tokenised once: seen
    ids = encode_prompt(tokenizer, {"messages": [message("user", text + attack)]})
    assert [token for token in ids if token < 7] == [BOS, USER, EOS, ASSISTANT]
    plain = encode_prompt(tokenizer, {"prompt": text + attack})
    assert [token for token in plain if token < 7] == [BOS]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": " \n"}, "empty prompt"),
        ({}, "expected text in `prompt`, got NoneType"),
        ({"prompt": 3}, "expected text in `prompt`, got int"),
        ({"messages": []}, "empty prompt"),
        ({"messages": "hello"}, "expected `messages` to be a list"),
        ({"messages": {"role": "user"}}, "expected `messages` to be a list"),
        ({"messages": ["hello"]}, r"messages\[0\]: expected role"),
        ({"messages": [message("critic", "x")]}, r"messages\[0\]: expected role .*'critic'"),
        ({"messages": [message("user", "a"), message("tool", "x")]}, r"messages\[1\] of role tool"),
        ({"messages": [message("user", "a")], "tools": [{}]}, "with text alone, got tools;"),
        ({"messages": [message("user", "a"), {"role": "user"}]}, r"messages\[1\]: expected text in `content`"),
        ({"messages": [message("user", "  ")]}, "empty message"),
        ({"messages": CONVERSATION}, "assistant's own message last"),
    ],
)
def test_prompts_that_cannot_be_used(tokenizer, record, expected):
    with pytest.raises(DataError, match=expected):
        encode_prompt(tokenizer, record)


@pytest.mark.parametrize("messages", [[message("user", "a")], [message("assistant", "a")]])
def test_demonstrations_without_an_answer(tokenizer, messages):
    for encode in (encode_demonstration, encode_all_turns):
        with pytest.raises(DataError, match="with an answer in it"):
            encode(tokenizer, {"messages": messages})
    with pytest.raises(DataError, match="`completion`"):
        encode_demonstration(tokenizer, {"prompt": "a"})


def test_truncation_hand_worked(tokenizer):
    size = len(encode_prompt(tokenizer, {"messages": CONVERSATION[:4]}))
    assert truncate_history(CONVERSATION[:4], tokenizer, size + 10, 10) == (CONVERSATION[:4], 0)
    # one token less and the first question goes with its answer; fails if the answer alone stays behind: seen
    assert truncate_history(CONVERSATION[:4], tokenizer, size + 9, 10) == ([CONVERSATION[0], CONVERSATION[3]], 2)


histories = st.builds(
    lambda system, turns, last: [
        *([message("system", "the rules")] if system else []),
        *(message(role, content) for role, content in turns),
        message("user", last),
    ],
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8)), max_size=8),
    st.text(min_size=1, max_size=8).filter(str.strip),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(histories, st.integers(0, 120), st.integers(0, 40))
def test_truncation_keeps_a_whole_suffix_within_the_budget(tokenizer, messages, budget, reserve):
    # fails if the reserve, BOS or the closing role token is not counted, or the newest goes first: seen
    def size(kept):
        return len(encode_prompt(tokenizer, {"messages": kept}))

    system = [m for m in messages if m["role"] == "system"]
    history = messages[len(system) :]
    try:
        kept, dropped = truncate_history(messages, tokenizer, budget, reserve)
    except ConfigError:
        assert size([*system, history[-1]]) > budget - reserve
        return
    assert size(kept) <= budget - reserve
    assert len(kept) + dropped == len(messages)
    assert kept == system + history[dropped:]  # system first, then an unbroken, unchanged suffix
    assert kept[-1] == messages[-1]
    if dropped:
        assert history[dropped]["role"] == "user"  # never an answer whose question is gone
        # and no more than needed: the exchange before the cut would not have fitted
        starts = [i for i, m in enumerate(history[:dropped]) if m["role"] == "user"]
        assert size(system + history[(starts[-1] if starts else 0) :]) > budget - reserve


def test_truncation_refuses_to_cut_the_last_turn(tokenizer):
    with pytest.raises(
        ConfigError, match="expected the system messages and the last turn to fit in 12 − 4 tokens, got"
    ):
        truncate_history(CONVERSATION[:4], tokenizer, 12, 4)
