"""Text in pieces against the text of all ids at once."""

from pathlib import Path

import numpy as np
import pytest

from rlhfjax.text.loading import load_tokenizer
from rlhfjax.text.streaming import TextStream

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
TEXT = "Ein Fluß – 東京, naïve 👩‍🚀!\n\nzwei   Wörter \u200b"


@pytest.fixture(scope="module", params=["own", "byte_level", "sentence_piece"])
def tokenizer(request):
    directory = GOLDEN / request.param
    return load_tokenizer(directory / "own" if request.param == "own" else directory)


def pieces_of(tokenizer, ids, after=None, stop=()):
    """The pieces that each id brought, up to a stop string, and what the end brought."""
    stream, pieces = TextStream(tokenizer, after, stop), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream.stopped


def test_no_piece_has_half_a_character(tokenizer):
    # fails when bytes are given out as they come
    ids = tokenizer.encode_continuation(TEXT)
    pieces, _ = pieces_of(tokenizer, ids, ids[0])
    assert "".join(pieces) == tokenizer.decode_continuation(ids, ids[0])
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 5


# 300 ids, so that those decoded again are cut several times
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_ids_are_the_text_of_all(tokenizer, seed):
    # Bytes that are no character among them: of one tokenizer a single such byte makes a whole run of bytes unreadable.
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tokenizer.vocab_size, 300).tolist()
    for place in rng.integers(0, 280, 6):
        some = tokenizer.encode_continuation(TEXT[rng.integers(0, 20) :])
        ids[place : place + len(some)] = some
    pieces, _ = pieces_of(tokenizer, ids, ids[7])
    assert "".join(pieces) == tokenizer.decode_continuation(ids, ids[7])


@pytest.mark.parametrize(
    "stop", [["zwei"], ["\n\n"], ["never", "京,"], ["Wörter \u200b!", "r \u200b"], ["t", "ß –"], ["Ein"]]
)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_begin(tokenizer, stop):
    # fails when the beginning of a stop string is given out before it is whole: seen
    ids = tokenizer.encode_continuation(TEXT)
    whole = tokenizer.decode_continuation(ids)
    pieces, stopped = pieces_of(tokenizer, ids, stop=stop)
    places = [whole.find(text) for text in stop if text in whole]
    assert stopped == bool(places)
    assert "".join(pieces) == whole[: min(places)]
    # it ends with the first token with which the text has one
    count = len(pieces) - 1
    assert not any(text in tokenizer.decode_continuation(ids[: count - 1]) for text in stop)
    assert any(text in tokenizer.decode_continuation(ids[:count]) for text in stop)


def test_what_only_looks_like_a_stop_string_is_held_back_until_it_is_none(tokenizer):
    ids = tokenizer.encode_continuation("one two three")
    pieces, stopped = pieces_of(tokenizer, ids, stop=["three!", "o three four", "e two thr33"])
    assert not stopped
    assert "".join(pieces) == tokenizer.decode_continuation(ids)
    assert "e" not in "".join(pieces[:-1])[len("one two ") :]
