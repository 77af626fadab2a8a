"""Tokenizers of published models against the ids that transformers gives (tests/golden/make_tokenizers.py)."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhfjax.errors import ConfigError, DataError, IntegrityError
from rlhfjax.text.chat import encode_all_turns, encode_demonstration, encode_prompt, encode_response, truncate_history
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer, to_huggingface, tokenizer_from
from rlhfjax.text.tokenizer import Tokenizer

from .conftest import CORPUS

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
ENDOFTEXT, IM_START, IM_END = 0, 1, 2


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def chatml():
    return load_tokenizer(GOLDEN / "byte_level")


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece", "own"])
def both(request, tmp_path_factory):
    """A tokenizer, and what transformers says of the same files."""
    source = GOLDEN / request.param
    directory = source
    if request.param == "own":
        directory = tmp_path_factory.mktemp("own")
        for name, text in to_huggingface(load_tokenizer(source / "own")).items():
            (directory / name).write_text(text)
    return load_tokenizer(directory), json.loads((source / "expected.json").read_text())


def test_ids_and_texts_of_transformers(both):
    # fails with another pre-tokenizer, or without the space before a SentencePiece text: both seen
    tokenizer, expected = both
    assert {line: tokenizer.encode(line) for line in expected["lines"]} == expected["lines"]
    assert {line: tokenizer.decode(ids) for line, ids in expected["lines"].items()} == expected["decoded"]
    assert tokenizer.encode_batch(list(expected["lines"])) == list(expected["lines"].values())


def test_special_tokens_in_text_are_text(both):
    # transformers with split_special_tokens=True; fails if the special tokens keep their names: seen
    tokenizer, expected = both
    assert {line: tokenizer.encode(line) for line in expected["marked"]} == expected["marked"]
    assert encode_prompt(tokenizer, {"prompt": "a"}) == expected["beginning"]


def test_chats_of_transformers(both):
    tokenizer, expected = both
    assert expected["chats"]
    for chat, ids in expected["chats"]:
        assert tokenizer.encode_chat(messages(*chat), add_generation_prompt=True) == ids


def test_a_file_without_tokenizer_json_is_converted_exactly():
    # against SentencePiece itself; transformers differs from it only where a text begins with a space
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "sentence_piece" / "tokenizer.model"))
    ours = load_tokenizer(GOLDEN / "sentence_piece")
    lines = [line for line in [*CORPUS, "a <mark> b", "水 water", "x  y", "abababa", "aaaa aaa"] if line[0] != " "]
    for line in lines:
        assert ours.encode(line) == own.encode(line)
        assert ours.decode(own.encode(line)) == line
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)


LETTERS = st.text(alphabet="  ab\n\ttheansr\u2581\u2585é水🙂<|/>0x41s", max_size=60)
SPELLED = st.sampled_from(["", "</s>", "<s>", "<|user|>", "<0x0A>", "the answer", "  ", "<unk>", "<pad>"])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.one_of(LETTERS, st.text(max_size=30)), SPELLED, st.text(max_size=5))
@example(" \u2581\u2581a\u2581 b\u2581", "", "")
@example("", "", "")
def test_our_tokenizer_as_tokenizer_json_is_exact(exported, tokenizer, first, second, third):
    # fails if pieces are written with U+2581, with a prefix, or with pairs ranked by id: the first two seen
    text = first + second + third
    ids = tokenizer.encode(text)
    raw, wrapped = exported
    assert raw.encode(text, add_special_tokens=False).ids == ids == wrapped.encode(text)
    assert raw.decode(ids) == text == wrapped.decode(ids)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    for name, text in to_huggingface(tokenizer).items():
        (directory / name).write_text(text)
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.encode_special_tokens = True
    return raw, load_tokenizer(directory)


def test_our_conversations_as_chat_template(tokenizer, exported):
    chat = messages(("system", " rules </s>"), ("user", "<|assistant|> hi"), ("assistant", "yo"), ("user", "q "))
    assert exported[1].encode_chat(chat, True) == encode_prompt(tokenizer, {"messages": chat})
    wrapped = exported[1]
    assert (wrapped.bos_id, wrapped.eos_id, wrapped.pad_id, wrapped.unk_id) == (1, 2, 0, 3)
    assert encode_prompt(wrapped, {"prompt": "a"}) == encode_prompt(tokenizer, {"prompt": "a"})


def test_unigram_has_no_exact_tokenizer_json():
    with pytest.raises(ConfigError, match="unigram, which has no exact"):
        to_huggingface(Tokenizer.train(CORPUS, 310, model_type="unigram"))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=20), st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "im_end|>"]))
def test_content_never_becomes_a_special_token(chatml, text, attack):
    # fails if the rendered conversation is tokenised as transformers does: seen
    specials = {ENDOFTEXT, IM_START, IM_END}
    assert not specials & set(chatml.encode(text + attack))
    assert chatml.decode(chatml.encode(text + attack)) == text + attack
    ids = chatml.encode_chat(messages(("system", attack + text), ("user", text + attack)), True)
    assert [token for token in ids if token in specials] == [IM_START, IM_END, IM_START, IM_END, IM_START]


def test_a_template_that_would_complete_a_special_token_is_refused(chatml):
    described = chatml.description | {"chat_template": "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"}
    tokenizer = HuggingFaceTokenizer(described)
    assert tokenizer.decode(tokenizer.encode_chat(messages(("user", "hi")), True)) == "<hi>"
    # fails without the comparison with neutral contents: seen
    with pytest.raises(DataError, match="spell no special token"):
        tokenizer.encode_chat(messages(("user", "|im_end|")), True)


def test_prompts_and_responses_in_chatml(chatml):
    e = chatml.encode
    chat = messages(("system", "S"), ("user", "Q"), ("assistant", "first"), ("user", "R"), ("assistant", "second"))
    prompt, response = encode_demonstration(chatml, {"messages": chat})
    start = [IM_START, *e("system\nS"), IM_END, *e("\n"), IM_START, *e("user\nQ"), IM_END, *e("\n"), IM_START]
    between = [IM_END, *e("\n"), IM_START, *e("user\nR"), IM_END, *e("\n"), IM_START, *e("assistant\n")]
    assert prompt == [*start, *e("assistant\nfirst"), *between]
    assert response == [*e("second"), IM_END] == encode_response(chatml, "second")
    tokens, trained = encode_all_turns(chatml, {"messages": chat})
    assert tokens == prompt + response
    # fails if the newline after an answer, or an answer's end alone, is trained otherwise: seen
    picked = [token for token, wanted in zip(tokens, trained, strict=True) if wanted]
    assert picked == [*e("first"), IM_END, *e("second"), IM_END]
    assert encode_demonstration(chatml, {"prompt": "a", "completion": " b"}) == (e("a"), [*e(" b"), IM_END])


def test_history_that_fits_a_template(chatml):
    chat = messages(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    size = len(encode_prompt(chatml, {"messages": chat}))
    assert truncate_history(chat, chatml, size + 5, 5) == (chat, 0)
    assert truncate_history(chat, chatml, size + 4, 5) == ([chat[0], chat[3]], 2)
    with pytest.raises(ConfigError, match="to fit in 5 − 1 tokens"):
        truncate_history(chat, chatml, 5, 1)


def test_a_template_that_rewrites_earlier_answers(chatml):
    source = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer = HuggingFaceTokenizer(chatml.description | {"chat_template": source})
    chat = messages(("user", "Q"), ("assistant", "first"), ("user", "R"), ("assistant", "second"))
    assert encode_demonstration(tokenizer, {"messages": chat})[1] == [*tokenizer.encode("second"), IM_END]
    with pytest.raises(DataError, match="train on the last answer alone"):
        encode_all_turns(tokenizer, {"messages": chat})


def test_what_ends_a_response(chatml):
    assert (chatml.eos_id, chatml.eos_ids, chatml.bos_id, chatml.pad_id) == (IM_END, (IM_END, ENDOFTEXT), None, IM_END)
    # Where the model's end of text is another token than the end of a turn, it is the turn that is answered.
    named = chatml.description["named"] | {"eos_token": "<|endoftext|>"}
    base = HuggingFaceTokenizer(chatml.description | {"named": named, "eos_ids": []})
    assert (base.eos_id, base.eos_ids) == (IM_END, (ENDOFTEXT,))
    plain = HuggingFaceTokenizer(chatml.description | {"named": named, "eos_ids": [], "chat_template": None})
    assert plain.eos_id == ENDOFTEXT
    with pytest.raises(ConfigError, match="with a chat template for messages, got one without"):
        encode_prompt(plain, {"messages": messages(("user", "hi"))})
    assert encode_prompt(plain, {"prompt": "hi"}) == plain.encode("hi")
    with pytest.raises(ConfigError, match="ends of text"):
        HuggingFaceTokenizer(plain.description | {"named": named | {"eos_token": None}})


def test_bytes_and_directories_come_back(chatml, tmp_path):
    again = tokenizer_from("huggingface", chatml.to_bytes())
    assert again.fingerprint == chatml.fingerprint
    chatml.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == chatml.fingerprint
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "saved").iterdir())
    with pytest.raises(IntegrityError, match="kind"):
        tokenizer_from("other", b"")
    (tmp_path / "saved" / "chat_template.jinja").write_text("another")
    with pytest.raises(IntegrityError, match="expected a tokenizer with SHA-256"):
        load_tokenizer(tmp_path / "saved")


def test_both_kinds_are_found_in_directories(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert tokenizer_from("sentencepiece", tokenizer.to_bytes()).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(GOLDEN / "sentence_piece").kind == "huggingface"
    with pytest.raises(ConfigError, match="expected a tokenizer at"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "error", "expected"),
    [
        (b"{", IntegrityError, "expected JSON"),
        (b"[]", IntegrityError, "JSON object, got list"),
        (b"\xff", IntegrityError, "UTF-8"),
        (b"[" * 200_000, IntegrityError, "expected JSON"),
        (b'{"model": {"vocab": {}}, "added_tokens": []}', IntegrityError, "parts of a tokenizer.json"),
        (b"{}", IntegrityError, "tokenizer.json"),
        (b'{"model": 1}', IntegrityError, "tokenizer.json"),
    ],
)
def test_broken_files(tmp_path, content, error, expected):
    shutil.copytree(GOLDEN / "byte_level", tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_bytes(content)
    with pytest.raises(error, match=expected):
        load_tokenizer(tmp_path / "t")


def test_names_of_pieces_and_ids_outside(chatml):
    assert chatml.pieces([IM_START, IM_END]) == ["<|im_start|>", "<|im_end|>"]
    assert chatml.decode([IM_START, *chatml.encode("a"), IM_END]) == "a"
    with pytest.raises(DataError, match="token ids in"):
        chatml.decode([chatml.vocab_size])
    with pytest.raises(DataError, match="lone surrogate"):
        chatml.encode("\ud800")


def test_special_tokens_that_the_model_could_make_from_text():
    # A unigram model and a word in one piece find special tokens in their own vocabulary, whatever flag is set.
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], *([c, -2.0] for c in "</s>ab")]}
    added = {"id": 1, "content": "</s>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = {
        "tokenizer": {"version": "1.0", "added_tokens": [flags | added], "model": model},
        "named": {"bos_token": None, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None},
        "adds_bos": False,
        "eos_ids": [],
        "chat_template": None,
    }
    # fails if the vocabulary keeps the name: seen
    assert HuggingFaceTokenizer(described).encode("a</s>b") == [6, 2, 3, 4, 5, 7]
    model = {"type": "BPE", "vocab": {"</s>": 0, "<": 1, "/s>": 2, "/": 3, "s": 4, ">": 5, "/s": 6}}
    model["merges"] = ["/ s", "/s >", "< /s>"]
    described["tokenizer"] = {"version": "1.0", "added_tokens": [flags | added | {"id": 0}], "model": model}
    described["named"]["unk_token"] = None
    assert HuggingFaceTokenizer(described).encode("</s>") == [1, 2]


def test_padding_with_a_letter_leaves_the_letter_alone(chatml, tmp_path):
    shutil.copytree(GOLDEN / "byte_level", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.pad_id == tokenizer.encode("!")[0]
    assert tokenizer.encode("Hi!") == chatml.encode("Hi!")


def test_a_model_of_sentence_piece_alone_names_its_own_ends(tmp_path):
    # no other file; fails ("expected a tokenizer with ends of text") if only the named ones are asked: seen
    shutil.copy(GOLDEN / "sentence_piece" / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.end_ids) == (1, 2, 0, (2,))
    assert encode_prompt(tokenizer, {"prompt": "a"}) == [1, *tokenizer.encode("a")]


def test_an_end_that_only_the_configuration_of_the_model_names(tmp_path):
    shutil.copytree(GOLDEN / "byte_level", tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").unlink()
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "t" / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert load_tokenizer(tmp_path / "t").end_ids == (ENDOFTEXT,)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": [2, 6]}, (2, 6)),
        (None, {"eos_token_id": 6}, (2, 6)),
        (None, {"text_config": {"eos_token_id": [6, 2]}}, (2, 6)),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 6}, (2, 0)),  # config.json is asked only where this one is silent
        ({"temperature": 1.0}, {"eos_token_id": 6}, (2, 6)),
        (None, {"eos_token_id": None}, (2,)),
        (None, {"eos_token_id": 50256}, (2,)),  # a default that the vocabulary does not have
        (None, {}, (2,)),
    ],
)
def test_ends_that_the_configuration_names(tmp_path, generation, config, expected):
    # as transformers makes generation settings out of config.json where it has no others; fails (2 alone) without: seen
    shutil.copytree(GOLDEN / "byte_level", tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").unlink()
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / "t" / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert (tokenizer.end_ids, tokenizer.eos_id) == (expected, IM_END)
    again = HuggingFaceTokenizer.from_bytes(tokenizer.to_bytes())
    assert again.end_ids == expected
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").end_ids == expected
