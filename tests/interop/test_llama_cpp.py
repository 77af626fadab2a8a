"""Exports read by llama.cpp itself: the same tokens of texts, and the same greedy answers.

`RLHFJAX_LLAMA_CPP_PYTHON` is an interpreter that has llama-cpp-python (`pip install llama-cpp-python` builds it in some
minutes); nothing else needs it.
"""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.api.model import Model
from rlhfjax.interop.families import config_of
from rlhfjax.interop.gguf_export import export_gguf
from rlhfjax.interop.gguf_vocabulary import PROBES
from rlhfjax.leaves import InMemory
from rlhfjax.models import LanguageModel
from rlhfjax.text.loading import load_tokenizer
from tests.interop.test_gguf import MODELS, random_params

pytestmark = pytest.mark.live
PYTHON = os.environ.get("RLHFJAX_LLAMA_CPP_PYTHON")
TOKENIZERS = Path(__file__).parents[1] / "golden" / "tokenizers"
PROMPTS, LENGTH, NEW = 20, 8, 32
FAMILIES = [
    "llama",
    "llama-untied",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "granite",
    "gptneox",
    "phi3",
    "olmo2",
    "smollm3",
]

READER = """
import json, sys
import numpy as np
from llama_cpp import Llama

asked = json.load(sys.stdin)
F32 = 0  # of keys and values, which are float16 by default
settings = {"n_ctx": asked["context"], "logits_all": True, "type_k": F32, "type_v": F32, "n_threads": 2}
model = Llama(asked["path"], verbose=False, **settings)
answers, logits = [], []
for prompt in asked["prompts"]:
    model.reset()
    model.eval(prompt)
    logits.append(np.asarray(model.scores[: len(prompt)]).tolist())
    made = []
    for _ in range(asked["new"]):
        made.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(made[-1:])
    answers.append(made)
texts = [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]
json.dump({"answers": answers, "logits": logits, "texts": texts}, sys.stdout)
"""


def asked_of_llama_cpp(path, prompts, context, new=NEW, texts=()):
    assert PYTHON, "set RLHFJAX_LLAMA_CPP_PYTHON"
    asked = {"path": str(path), "prompts": prompts, "context": context, "new": new, "texts": list(texts)}
    done = subprocess.run([PYTHON, "-c", READER], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def small(family, tokenizer):
    sizes = {"vocab_size": tokenizer.vocab_size + 5}
    sizes |= {"n_positions": 64} if family == "gpt2" else {"max_position_embeddings": 64}
    if family == "phi3":
        sizes["sliding_window"] = 64  # llama.cpp has no windows for it
    if family == "olmo2":
        sizes["tie_word_embeddings"] = False
    return MODELS[family] | sizes


@pytest.mark.parametrize("quantize", ["f32", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_same(family, quantize, tmp_path):
    tokenizer = load_tokenizer(TOKENIZERS / "own" / "own")
    hf = small(family, tokenizer)
    params, config = random_params(hf), config_of(hf)
    path = tmp_path / "m.gguf"
    export_gguf(path, LanguageModel(config), InMemory(params), tokenizer, quantize=quantize)
    draw = np.random.default_rng(0)
    prompts = [[tokenizer.bos_id, *draw.integers(8, tokenizer.vocab_size, LENGTH - 1).tolist()] for _ in range(PROMPTS)]
    found = asked_of_llama_cpp(path, prompts, LENGTH + NEW + 1)
    model = Model("policy", LanguageModel(config), params, None)
    ours = np.asarray(model.logits(jnp.asarray(prompts)))
    error = np.abs(ours - np.asarray(found["logits"])).max() / np.abs(ours).max()
    # llama.cpp looks a GELU up in a table of float16, and what it multiplies with eight bits it rounds to as many.
    table = 3e-3 if family.startswith(("gemma", "gpt")) else 1e-4
    assert error <= {"f32": table, "q8_0": 0.6}[quantize], error
    if quantize == "f32":
        answers = model.generate(prompts, max_new_tokens=NEW, temperature=0)
        for prompt, [one], theirs in zip(prompts, answers, found["answers"], strict=True):
            if one.tokens != theirs:
                assert gap(model, prompt, one.tokens, theirs) <= 2 * table * np.abs(ours).max()


def gap(model, prompt, ours, theirs):
    """How far apart our logits have the two tokens at which the answers part: as near as GELUs differ."""
    at = next(place for place, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    row = np.asarray(model.logits(jnp.asarray([[*prompt, *ours[:at]]])))[0, -1]
    return row[ours[at]] - row[theirs[at]]


@pytest.mark.parametrize("name", ["own/own", "byte_level", "sentence_piece"])
def test_texts_have_the_same_tokens(name, tmp_path):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    hf = MODELS["llama"] | {"vocab_size": tokenizer.vocab_size}
    path = tmp_path / "m.gguf"
    export_gguf(path, LanguageModel(config_of(hf)), InMemory(random_params(hf)), tokenizer)
    found = asked_of_llama_cpp(path, [], 32, texts=PROBES)
    assert found["texts"] == [tokenizer.encode(text) for text in PROBES]
