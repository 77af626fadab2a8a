"""GGUF vocabularies against llama.cpp's own vectors: its folder `models`, named by `RLHFJAX_LLAMA_CPP_MODELS`.

A vocabulary is ggml-vocab-NAME.gguf; beside it, .inp has texts and .out the ids that llama.cpp has for each.
"""

import os
from pathlib import Path

import pytest

from rlhfjax.interop.gguf_files import open_file
from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata

FOLDER = os.environ.get("RLHFJAX_LLAMA_CPP_MODELS")
VOCABULARIES = [path.with_suffix("") for path in sorted(Path(FOLDER).glob("ggml-vocab-*.gguf.out"))] if FOLDER else []


@pytest.mark.live
@pytest.mark.skipif(not FOLDER, reason="RLHFJAX_LLAMA_CPP_MODELS names no folder")
def test_the_folder_has_vocabularies():
    assert VOCABULARIES


@pytest.mark.live
@pytest.mark.parametrize("path", VOCABULARIES, ids=lambda path: path.stem)
def test_ids_are_those_of_llama_cpp(path):
    tokenizer, note = tokenizer_of_metadata(open_file(path).metadata)
    if tokenizer is None:
        pytest.skip(note)
    # newline="": a text may have a carriage return
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    ids = [[int(index) for index in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    texts = texts[: len(ids)]  # the last one is followed by a separator, too
    assert texts
    assert {text: tokenizer.encode(text) for text in texts} == dict(zip(texts, ids, strict=True))
