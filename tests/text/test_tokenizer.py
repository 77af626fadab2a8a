"""The tokenizer: exact on every text, closed to special tokens, the same bytes for the same corpus."""

import hashlib
import stat

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhfjax.errors import ConfigError, DataError, IntegrityError
from rlhfjax.text.tokenizer import Tokenizer

from .conftest import CORPUS

ANY_TEXT = st.text(max_size=40)  # every code point but surrogates, controls included
SPECIAL_STRINGS = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<0x41>", "<0x0A>"]
SPECIALS = set(range(7))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT)
@example("")
@example("  two  spaces  \n\n\ttab\r\nend ")
@example("\x00\x1b[31m\x7f\u0085\u2028")
@example("ﬁ ① ｆｕｌｌ e\u0301 \u200b\ufeff \u00a0")  # all rewritten by NFKC
@example("\u2581")
@example(" \u2581\u2581a\u2581 b\u2581")
@example("\u2585 \ufffd \U0010ffff 👩‍👩‍👧")
def test_every_text_comes_back(tokenizer, text):
    # fails with the default normalisation, with the dummy space, or with U+2581 left to SentencePiece: each seen
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not SPECIALS & set(ids)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, ANY_TEXT)
@example("The capital of France is", " Paris")
@example("The capital of France is ", "Paris")
def test_prompt_and_response_join_as_ids_and_as_text(tokenizer, prompt, response):
    # fails with the dummy space: seen
    first, second = tokenizer.encode(prompt), tokenizer.encode(response)
    assert tokenizer.decode(first) + tokenizer.decode(second) == prompt + response == tokenizer.decode(first + second)


@pytest.mark.parametrize("text", SPECIAL_STRINGS)
@pytest.mark.parametrize("form", ["{}", "a {} b", "{0}{0}", "▁{}"])
def test_text_never_spells_a_special_token(tokenizer, text, form):
    # fails if roles are user-defined symbols instead of control symbols: seen
    ids = tokenizer.encode(form.format(text))
    assert not SPECIALS & set(ids)
    assert tokenizer.decode(ids) == form.format(text)


def test_text_with_special_strings_can_be_trained_on():
    corpus = [f"say {text}{text} and the {text} again" for text in SPECIAL_STRINGS] * 20
    trained = Tokenizer.train(corpus, 290)
    for text in SPECIAL_STRINGS:
        assert not SPECIALS & set(trained.encode(text))
        assert trained.decode(trained.encode(text)) == text


def test_special_ids_are_distinct_and_fixed(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.role_ids == {"system": 4, "user": 5, "assistant": 6}
    assert tokenizer.pieces([0, 2, 4, 5, 6]) == ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.vocab_size == 400


def test_decode_drops_specials_and_mends_cut_characters(tokenizer):
    ids = tokenizer.encode("the answer")
    # fails if UNK is left to SentencePiece, which prints " ⁇ ": seen
    assert tokenizer.decode([1, 5, *ids, 3, 2, 0, 0]) == "the answer"
    assert tokenizer.decode(tokenizer.encode("水")[:-1]) == "\ufffd" * 2
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("outside", [400, 10**9, -1])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, outside):
    # fails if negative ids are passed on to SentencePiece: seen
    with pytest.raises(DataError, match=f"0…399, got {outside}"):
        tokenizer.decode([7, outside])


def test_batch_is_each_text_by_itself(tokenizer):
    texts = ["the answer", "", "a▁b", "\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(model_type):
    size = {"bpe": 400, "unigram": 320}[model_type]
    first, second = (Tokenizer.train(iter(CORPUS), size, model_type=model_type) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    assert first.fingerprint == hashlib.sha256(first.to_bytes()).hexdigest()
    assert first.decode(first.encode("schöne  Wellen\n")) == "schöne  Wellen\n"


def test_sampling_of_lines_is_a_function_of_the_seed():
    corpus = [f"line {number} says {number * 7919}" for number in range(2000)]
    trained = [Tokenizer.train(corpus, 300, max_sentences=50, seed=seed).fingerprint for seed in (0, 0, 1)]
    # fails if the seed is not used, or the draw is not seeded: seen
    assert trained[0] == trained[1] != trained[2]
    whole = Tokenizer.train(corpus, 300).fingerprint
    assert Tokenizer.train(corpus, 300, max_sentences=5000, seed=3).fingerprint == whole != trained[0]


def test_one_long_document_is_trained_on_whole():
    # SentencePiece skips lines of more than 4,192 bytes, and lines with U+2585. Fails without the cutting: seen
    for corpus in (["the answer is the answer " * 2000], ["the answer is \u2585 the answer\x00 the answer"] * 9):
        trained = Tokenizer.train(corpus, 280)
        assert len(trained.encode("the answer")) <= 3


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_impossible_vocabulary_sizes_name_the_limit(model_type):
    # fails if SentencePiece's own message is passed on: seen
    with pytest.raises(ConfigError, match=r"at most \d+ for this corpus, got 50000") as high:
        Tokenizer.train(CORPUS, 50_000, model_type=model_type)
    largest = int(str(high.value).split("at most ")[1].split()[0])
    assert Tokenizer.train(CORPUS, largest, model_type=model_type).vocab_size == largest
    with pytest.raises(ConfigError, match=r"at least \d+ .* got 100$") as low:
        Tokenizer.train(CORPUS, 100, model_type=model_type)
    smallest = int(str(low.value).split("at least ")[1].split()[0])
    assert Tokenizer.train(CORPUS, smallest, model_type=model_type).vocab_size == smallest


@pytest.mark.parametrize("corpus", [[], [""], ["\n\n", "\x00"], ["  "]])
def test_a_corpus_without_text_is_refused(corpus):
    with pytest.raises(DataError, match="got none"):
        Tokenizer.train(corpus, 300)


def test_lone_surrogates_and_other_model_types_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"'\\ud800' at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="surrogate"):
        Tokenizer.train(["\udfff"], 300)
    with pytest.raises(ConfigError, match="wordpiece"):
        Tokenizer.train(CORPUS, 300, model_type="wordpiece")  # type: ignore[arg-type]


def test_training_is_silent(capfd):
    # fails without the log level: seen
    Tokenizer.train(CORPUS, 400)
    with pytest.raises(ConfigError):
        Tokenizer.train(CORPUS, 50_000)
    assert capfd.readouterr() == ("", "")


def test_saved_is_loaded_private_and_without_leftovers(tokenizer, tmp_path):
    directory = tmp_path / "run" / "tokenizer"
    tokenizer.save(directory)
    tokenizer.save(directory)  # again, over itself
    loaded = Tokenizer.load(directory)
    assert loaded.fingerprint == tokenizer.fingerprint == Tokenizer.from_bytes(tokenizer.to_bytes()).fingerprint
    assert loaded.encode("the answer") == tokenizer.encode("the answer")
    files = sorted(directory.iterdir())
    assert [file.name for file in files] == ["tokenizer.model", "tokenizer.model.sha256"]
    # fails with open() and the usual umask: seen
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_save_that_fails_leaves_the_old_model(tokenizer, tmp_path, monkeypatch):
    # fails if the model is written in place: seen
    tokenizer.save(tmp_path)
    other = Tokenizer.train(CORPUS, 350)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        other.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]


def test_missing_files_and_damaged_files_are_told_apart(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.tokenizer\.model, got No such file"):
        Tokenizer.load(tmp_path / "nowhere")
    tokenizer.save(tmp_path)
    model = tmp_path / "tokenizer.model"
    damaged = bytearray(model.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    model.write_bytes(damaged)
    # fails if the digest is not compared: seen
    with pytest.raises(IntegrityError, match=r"tokenizer\.model: expected SHA-256"):
        Tokenizer.load(tmp_path)
    with pytest.raises(IntegrityError, match="expected a SentencePiece model, got 9 other bytes"):
        Tokenizer.from_bytes(b"not model")


def test_models_of_other_projects_are_refused(tmp_path):
    # fails if special ids are not checked on opening: seen
    corpus, prefix = tmp_path / "corpus.txt", tmp_path / "foreign"
    corpus.write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(prefix), vocab_size=60, minloglevel=2)
    with pytest.raises(ConfigError, match="special ids"):
        Tokenizer.from_bytes(prefix.with_suffix(".model").read_bytes())
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(prefix),
        vocab_size=60,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
    )
    with pytest.raises(ConfigError, match=r"<\|system\|>"):
        Tokenizer.from_bytes(prefix.with_suffix(".model").read_bytes())
    with pytest.raises(ConfigError, match="special ids"):
        Tokenizer.from_bytes(b"")
