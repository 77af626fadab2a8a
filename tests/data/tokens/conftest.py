"""Small corpora of each kind, and rows of tokens made of them in many shards."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rlhfjax.data.pipeline import Reader
from rlhfjax.data.tokens.plan import Rows
from rlhfjax.data.tokens.preparing import prepare_tokens
from rlhfjax.text.tokenizer import Tokenizer

WORDS = ["the", "film", "was", "a", "warm", "and", "very", "dull", "story", "of", "music"]
STEP = 700  # bytes of a file that make a shard
ROWS = {
    "documents": Rows("document", 16, packed=True),
    "demonstrations": Rows("demonstration", 40, packed=True),
    "comparisons": Rows("comparison", 40),
    "prompts": Rows("prompt", 32),
}


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], 300)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, tokenizer):
    """Files of records, and `make`, which makes rows of one of them; `rows` has each made as ROWS says."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(7)

    def words(low, high):
        return " ".join(draw.choice(WORDS, draw.integers(low, high)))

    def write(name, records):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def ranking(i):
        responses = [f"{words(1, 3)}{j}" for j in range(2 + i % 3)]
        return {"prompt": words(1, 3), "responses": responses, "ranks": [1, *[2] * (len(responses) - 1)]}

    write("documents", ({"text": f"{words(1, 30)} {i}"} for i in range(90)))
    write("demonstrations", ({"prompt": f"{words(1, 4)} {i}", "completion": words(1, 6)} for i in range(60)))
    write("comparisons", map(ranking, range(40)))
    write("prompts", ({"prompt": f"{words(1, 4)} {i}", "answer": i} for i in range(50)))

    def make(name, to, rows=None, **more):
        how = {"to": folder / to, "step": STEP} | more
        return prepare_tokens(str(folder / f"{name}.jsonl"), rows or ROWS[name], tokenizer, folder / "data", **how)

    rows = {name: make(name, f"rows_{name}") for name in ROWS}
    return SimpleNamespace(folder=folder, make=make, rows=rows)


@pytest.fixture
def reader(tokenizer, corpus):
    def opened(seed=0, **more):
        return Reader(tokenizer, corpus.folder / "data", seed, **more)

    return opened
