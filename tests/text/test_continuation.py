"""A response is a continuation: the text is exactly prompt + response, whatever the tokenizer puts before a text."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}
TO_SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
STRIPPED = [
    TO_SPACES,
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
LLAMA_2 = [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
]


def sentence_piece(**parts):
    """The golden SentencePiece vocabulary with other parts of a tokenizer.json."""
    described = load_tokenizer(GOLDEN / "sentence_piece").description
    return HuggingFaceTokenizer(described | {"tokenizer": described["tokenizer"] | parts})


KINDS = {
    "own": lambda: load_tokenizer(GOLDEN / "own" / "own"),
    "byte level": lambda: load_tokenizer(GOLDEN / "byte_level"),
    "tokenizer.model": lambda: load_tokenizer(GOLDEN / "sentence_piece"),
    "first": lambda: sentence_piece(pre_tokenizer=METASPACE | {"prepend_scheme": "first"}),
    "always": lambda: sentence_piece(pre_tokenizer=METASPACE | {"prepend_scheme": "always"}),
    "never": lambda: sentence_piece(
        pre_tokenizer=METASPACE | {"prepend_scheme": "never"}, decoder={"type": "Sequence", "decoders": STRIPPED[:3]}
    ),
    "prepended": lambda: sentence_piece(normalizer={"type": "Sequence", "normalizers": LLAMA_2}, pre_tokenizer=None),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text("a \n\tthe水🙂.", max_size=12).map("do".__add__), st.text("a \n\tthe水🙂.", max_size=12))
@example("do?", " It")
@example("do?", "It")
@example("do ", "It")
@example("do\n", "\n It")
@example("do", "    return x\n    ")
@example("do", "")
@example("do", " ")
def test_ids_of_prompt_and_response_are_their_text(kind, prompt, response):
    # fails if a response is encoded as a text of its own (first, always, prepended, tokenizer.model): seen
    asked, answer = kind.encode(prompt), kind.encode_continuation(response)
    assert kind.decode([*asked, *answer]) == prompt + response
    assert kind.decode(asked) + kind.decode_continuation(answer) == prompt + response
    assert kind.encode_continuation_batch([response]) == [answer]
