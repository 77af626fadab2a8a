"""A response is a continuation: the text is exactly prompt + response, whatever the tokenizer puts before a text."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer
from rlhfjax.text.sentencepiece_json import read_model
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.text.unkept import unkept

from .conftest import CORPUS

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


def byte_level(**parts):
    described = load_tokenizer(GOLDEN / "byte_level").description
    return HuggingFaceTokenizer(described | {"tokenizer": described["tokenizer"] | parts})


def gguf(model, tokens, **more):
    """The tokenizer that the metadata of a GGUF file describes."""
    entries = {"model": model, "tokens": tokens, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | more
    return tokenizer_of_metadata({f"tokenizer.ggml.{name}": value for name, value in entries.items()})[0]


def sentence_piece_of_gguf():
    pieces, _ = read_model((GOLDEN / "sentence_piece" / "tokenizer.model").read_bytes())
    texts, scores, kinds = (list(column) for column in zip(*pieces, strict=True))
    return gguf("llama", texts, scores=scores, token_type=kinds)


def byte_level_of_gguf():
    made = load_tokenizer(GOLDEN / "byte_level").description["tokenizer"]
    added = {token["content"]: token for token in made["added_tokens"]}
    vocab = made["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    tokens = sorted(vocab, key=vocab.get)
    kinds = [1 if token not in added else 3 if added[token]["special"] else 4 for token in tokens]
    merges = [" ".join(pair) for pair in made["model"]["merges"]]
    return gguf("gpt2", tokens, token_type=kinds, merges=merges, pre="smollm")


def unigram():
    """A unigram tokenizer.json with bytes, as T5's and its kin."""
    pieces, _ = read_model(Tokenizer.train(CORPUS, 310, model_type="unigram").to_bytes())
    model = {"type": "Unigram", "unk_id": 3, "byte_fallback": True, "vocab": [[p.text, p.score] for p in pieces]}
    return sentence_piece(
        model=model,
        added_tokens=[
            token | {"id": index}
            for token in load_tokenizer(GOLDEN / "sentence_piece").description["tokenizer"]["added_tokens"]
            for index in [next((i for i, p in enumerate(pieces) if p.text == token["content"]), None)]
            if index is not None
        ],
        normalizer=None,
        pre_tokenizer=METASPACE | {"prepend_scheme": "always"},
        decoder={"type": "Sequence", "decoders": STRIPPED},
    )


KINDS = {
    "own unigram": lambda: Tokenizer.train(CORPUS, 310, model_type="unigram"),
    "unigram": unigram,
    "SentencePiece of GGUF": sentence_piece_of_gguf,
    "byte level of GGUF": byte_level_of_gguf,
    "own": lambda: load_tokenizer(GOLDEN / "own" / "own"),
    "byte level": lambda: load_tokenizer(GOLDEN / "byte_level"),
    "tokenizer.model": lambda: load_tokenizer(GOLDEN / "sentence_piece"),
    "byte level with a space": lambda: byte_level(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "first": lambda: sentence_piece(normalizer=None, pre_tokenizer=METASPACE | {"prepend_scheme": "first"}),
    "always": lambda: sentence_piece(normalizer=None, pre_tokenizer=METASPACE | {"prepend_scheme": "always"}),
    "never": lambda: sentence_piece(
        normalizer=None,
        pre_tokenizer=METASPACE | {"prepend_scheme": "never"},
        decoder={"type": "Sequence", "decoders": STRIPPED[:3]},
    ),
    "prepended": lambda: sentence_piece(normalizer={"type": "Sequence", "normalizers": LLAMA_2}, pre_tokenizer=None),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]()


LETTERS = "a \n\tthe\u6c34\U0001f642.\u2581"


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.text(LETTERS, max_size=12).map("do".__add__), st.text(LETTERS, max_size=12))
@example("do?", " It")
@example("do?", "It")
@example("do ", "It")
@example("do\n", "\n It")
@example("do", "    return x\n    ")
@example("do", "")
@example("do", " ")
@example("do \u2581\U000f0000", "\u2581\u2581 \U000f0000x")
def test_ids_of_prompt_and_response_are_their_text(kind, prompt, response):
    # fails if a response is encoded as a text of its own (first, always, prepended, tokenizer.model): seen
    asked, answer = kind.encode(prompt), kind.encode_continuation(response)
    assert kind.decode([*asked, *answer]) == prompt + response
    assert kind.decode(asked) + kind.decode_continuation(answer) == prompt + response
    assert kind.encode_continuation_batch([response]) == [answer]


@pytest.mark.parametrize("name", ["own", "byte level", "tokenizer.model", "never", "prepended"])
@pytest.mark.parametrize("prompt", [" do", "  do", "\u2581do", "\n do"])
def test_a_prompt_that_begins_with_a_space_keeps_it(name, prompt):
    # fails with Metaspace, which puts no space before one: seen
    tokenizer = KINDS[name]()
    assert tokenizer.decode(tokenizer.encode(prompt) + tokenizer.encode_continuation(" x")) == prompt + " x"


@pytest.mark.parametrize("name", ["always", "prepended"])
def test_text_after_a_special_token_begins_anew_where_the_tokenizer_has_it_so(name):
    # "</s>the answer" in one piece, as transformers splits it, has a space before "the" that nobody wrote
    tokenizer = KINDS[name]()
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    chat = HuggingFaceTokenizer(tokenizer.description | {"chat_template": template})
    whole = chat.encode_chat([{"role": "user", "content": "do"}, {"role": "assistant", "content": "the answer"}], False)
    after = whole.index(chat.eos_id)
    response = whole[after + 1 : -1]
    assert chat.encode_continuation("the answer", after=whole[after]) == response
    assert chat.decode_continuation(response, after=whole[after]) == "the answer"
    assert chat.encode_continuation("the answer", after=whole[0]) != response
    assert chat.decode_continuation(response, after=whole[0]) == " the answer"


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ({}, ()),
        ({"normalizer": {"type": "NFC"}}, ("writes it in NFC",)),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFKC"}]}},
            ("lower-cases it", "writes it in NFKC"),
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}},
            ("replaces ' {2,}' by ' '",),
        ),
        ({"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, ("drops a space at its very beginning",)),
        ({"pre_tokenizer": {"type": "Whitespace"}}, ("drops its white space",)),
    ],
)
def test_what_of_a_text_is_not_kept_is_said(parts, changes):
    tokenizer = sentence_piece(**parts)
    assert unkept(tokenizer.description["tokenizer"]) == changes
    assert all(change in tokenizer.notes[0] for change in changes)
    assert bool(tokenizer.notes) == bool(changes)
