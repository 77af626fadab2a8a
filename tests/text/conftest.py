"""A small tokenizer, trained once on a few lines of our own."""

import pytest

from rlhfjax.text.tokenizer import Tokenizer

CORPUS = [
    "The assistant answers the question, and the labeler ranks the answers.",
    "What is the capital of France? The capital of France is Paris.\nIt lies on the Seine.",
    "\tdef f(x):\n\t    return x + 1\n",
    "Ein Tag am Meer: schöne Wellen, großer Spaß!",
] * 5


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(CORPUS, 400)
