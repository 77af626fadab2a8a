"""The effect of int8 and draft tokens on sampling: seconds, tokens per call, and the gap of log-probabilities.

    python -m benchmarks.sampling_options                    a Llama of random weights
    python -m benchmarks.sampling_options CKPT TEXTS.txt     a checkpoint that continues texts, one per line

One JSON object per line. Random weights make every draft token wrong, which shows best what a call with them costs.
On an accelerator they are 1.07 billion, elsewhere 14.7 million.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import standins

standins.install()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from rlhfjax.data.batches import left_padded  # noqa: E402
from rlhfjax.generation import SamplingParams, Speculation, generate  # noqa: E402
from rlhfjax.models import LanguageModel, compute_dtype, decoder_config  # noqa: E402
from rlhfjax.types import PromptBatch, Rollout  # noqa: E402

PRECISIONS = ("full", "int8_weights", "int8_cache", "int8")
REPEATS = 5


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Median wall time of a compiled function, and what it returns."""
    made, taken = jax.block_until_ready(function()), []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        made = jax.block_until_ready(function())
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken)), made


def gap(model: LanguageModel, params: Any, made: Rollout) -> float:
    """Mean over tokens of |log p of the sampler - log p of the forward pass that trains|, nats, at temperature 1."""

    @jax.jit
    def mean(params, made):
        logits = model.response_logits(params, made.prompt, made.prompt_mask, made.response, made.response_mask)
        said = jnp.take_along_axis(jax.nn.log_softmax(logits), made.response[:, :, None], axis=2)[:, :, 0]
        apart = jnp.where(made.response_mask, jnp.abs(said - made.sampled_log_probs), 0.0)
        return apart.sum() / made.response_mask.sum()

    return float(mean(params, made))


def measured(model: LanguageModel, params: Any, prompts: PromptBatch, sampling: SamplingParams) -> dict[str, Any]:
    """One way of sampling."""
    program = jax.jit(lambda p, b, k: generate(model, p, b, k, sampling))
    taken, made = seconds(lambda: program(params, prompts, jax.random.key(0)))
    tokens, guesses = int(made.response_mask.sum()), sampling.speculation
    row = {
        "rows": len(made.response),
        "prompt": prompts.tokens.shape[1],
        "tokens": tokens,
        "precision": model.precision,
    }
    row |= {"temperature": sampling.temperature, "seconds": round(taken, 4), "tokens_per_s": round(tokens / taken)}
    if guesses is None:
        return row | {"ms_per_call": round(1e3 * taken / sampling.max_new_tokens, 3)}
    calls, guessed, kept = (int(count) for count in made.counts.sum(axis=0))
    row |= {"guesses": f"{guesses.kind} {guesses.tokens}", "kept": round(kept / max(guessed, 1), 3)}
    row |= {"tokens_per_call": round((tokens - len(made.response)) / max(calls, 1), 3)}
    return row | {"ms_per_call": round(1e3 * taken / max(int(made.counts[:, 0].max()), 1), 3)}


def random_weights() -> None:
    """Every precision at two batch sizes and two lengths of prompts, and calls whose draft tokens are never right."""
    small = jax.default_backend() == "cpu"
    shape = {"layers": 4, "width": 512, "heads": 8, "vocab_size": 4096} if small else {
        "layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "vocab_size": 49152
    }  # fmt: skip
    model = LanguageModel(decoder_config("llama", context=4096, dtype=compute_dtype(), **shape))
    params, new = jax.jit(model.init)(jax.random.key(0)), 64 if small else 192

    def show(rows: int, length: int, precision: str, speculation: Speculation | None = None) -> None:
        tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, shape["vocab_size"]).astype(jnp.int32)
        batch = PromptBatch(tokens, jnp.ones((rows, length), bool), jnp.arange(rows, dtype=jnp.int32))
        settings = SamplingParams(new, -1, 0, speculation=speculation)
        print(json.dumps(measured(replace(model, precision=precision), params, batch, settings)), flush=True)

    for rows, length in ((8, 64), (64, 64), (64, 1024)) if not small else ((1, 64), (8, 64)):
        for precision in PRECISIONS:
            show(rows, length, precision)
    for rows, size in ((8, 2), (8, 4), (8, 8), (64, 4)) if not small else ((1, 2), (1, 4), (1, 8), (8, 4)):
        show(rows, 64, "full", Speculation("ngram", size))


def continued(checkpoint: str, texts: Path) -> None:
    """Greedy and at temperature 1, 48 tokens: every precision with its gap, then draft tokens."""
    import rlhfjax

    loaded = rlhfjax.load(checkpoint)
    rows = [loaded.tokenizer.encode(line) for line in texts.read_text(encoding="utf-8").splitlines() if line]
    tokens, mask = left_padded(rows, loaded.tokenizer.pad_id)
    batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(rows), dtype=jnp.int32))
    settings = SamplingParams(48, loaded.tokenizer.eos_id, loaded.tokenizer.pad_id)
    ways = [("ngram", 2), ("ngram", 4), *([("heads", loaded.config.mtp_heads)] if loaded.config.mtp_heads else [])]
    for temperature in (0.0, 1.0):
        drawn = replace(settings, temperature=temperature)
        for precision in PRECISIONS:
            model = replace(loaded.network, precision=precision)
            row = measured(model, loaded.params, batch, drawn)
            made = jax.jit(lambda p, b, k, m=model, s=drawn: generate(m, p, b, k, s))(
                loaded.params, batch, jax.random.key(0)
            )
            print(json.dumps(row | {"gap_nats": round(gap(loaded.network, loaded.params, made), 6)}), flush=True)
        for kind, size in ways:
            guessing = replace(drawn, speculation=Speculation(kind, size))
            print(json.dumps(measured(loaded.network, loaded.params, batch, guessing)), flush=True)


if __name__ == "__main__":
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    random_weights() if len(sys.argv) == 1 else continued(sys.argv[1], Path(sys.argv[2]))
