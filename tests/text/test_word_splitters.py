"""Where each named splitter cuts, against the expressions of llama.cpp in another engine (golden/make_word_cuts.py)."""

import json
from pathlib import Path

import pytest
import tokenizers

from rlhfjax.text.word_splitters import OF_ARCHITECTURE, SPLITTERS, pre_tokenizer
from tests.golden.word_lines import LINES

CUTS = json.loads((Path(__file__).parents[1] / "golden" / "tokenizers" / "word_cuts.json").read_text())
NAMES = {name: lengths for names, lengths in CUTS.items() for name in names.split()}


def test_every_name_is_there():
    assert SPLITTERS.keys() == NAMES.keys()
    assert set(OF_ARCHITECTURE.values()) <= NAMES.keys()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_lines_are_cut_as_by_the_expressions_of_llama_cpp(name):
    model = {"type": "BPE", "vocab": {}, "merges": []}
    made = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": pre_tokenizer(SPLITTERS[name])}
    cut = tokenizers.Tokenizer.from_str(json.dumps(made)).pre_tokenizer
    for line, lengths in zip(LINES, NAMES[name], strict=True):
        pieces = cut.pre_tokenize_str(line)
        assert [end - start for _, (start, end) in pieces] == lengths, (line, pieces)
