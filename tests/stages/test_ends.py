"""What ends a response that a stage draws: every id that the tokenizer names, or the text that the settings name."""

from pathlib import Path

import pytest

from rlhfjax.config import schema
from rlhfjax.errors import ConfigError
from rlhfjax.stages.models import plain_sampling, sampling_params
from rlhfjax.text.loading import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
IM_END, ENDOFTEXT = 2, 0  # generation_config.json of the first has both


def ends(settings):
    return (settings.stop_id, *settings.stop_ids)


def test_every_end_of_the_tokenizer_ends_a_response():
    # fails where eos_id alone is passed on: seen
    several = load_tokenizer(GOLDEN / "byte_level")
    assert ends(sampling_params(schema.Sampling(max_new_tokens=3), several)) == (IM_END, ENDOFTEXT) == several.end_ids
    assert ends(plain_sampling(3, several)) == (IM_END, ENDOFTEXT)
    one = load_tokenizer(GOLDEN / "own" / "own")
    assert ends(sampling_params(schema.Sampling(max_new_tokens=3), one)) == ends(plain_sampling(3, one)) == (2,)


def test_a_stop_of_ones_own_is_the_only_one_and_goes_on_after_text():
    tokenizer = load_tokenizer(GOLDEN / "sentence_piece")
    # fails (two tokens, the first a space) if it is encoded as a text of its own: seen
    assert tokenizer.pieces(ends(sampling_params(schema.Sampling(max_new_tokens=3, stop="\n"), tokenizer))) == ["\n"]
    with pytest.raises(ConfigError, match="text of one token"):
        sampling_params(schema.Sampling(max_new_tokens=3, stop="?!\n"), tokenizer)


def test_several_texts_and_ids_end_a_response_and_each_is_there_once():
    tokenizer = load_tokenizer(GOLDEN / "sentence_piece")
    [newline], [point] = (tokenizer.encode_continuation(text) for text in ("\n", "."))

    def settings(*stop):
        return ends(sampling_params(schema.Sampling(max_new_tokens=3, stop=list(stop)), tokenizer))

    assert settings("\n", ".", 7, newline) == (newline, point, 7)
    with pytest.raises(ConfigError, match=r"text of one token, got '\?!\\n'"):
        settings("\n", "?!\n")
    with pytest.raises(ConfigError, match=f"id below .*, got {tokenizer.vocab_size}"):
        settings(tokenizer.vocab_size)
