"""A model that is a table of logits: its every probability is known, and it compiles in no time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.generation import SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Last:
    """The cache of a model that knows a row's last token."""

    token: jax.Array

    def take(self, rows):
        return Last(self.token[rows])

    def put(self, part, rows):
        return Last(self.token.at[rows].set(part.token, mode="drop", unique_indices=True))


@dataclass(frozen=True)
class Bigram:
    """Logits of the next token are row `token` of the parameters."""

    def arrange(self, params, rows=None):
        return params

    def empty_cache(self, rows, prompt, new_tokens):
        return Last(jnp.zeros(rows, jnp.int32))

    def prefill(self, params, prompt, prompt_mask, new_tokens):
        return params[prompt[:, -1]], Last(prompt[:, -1])

    def decode(self, params, cache, tokens):
        return params[tokens], Last(tokens)


def some_settings(count: int, words: int, stop_id: int, most: int = 16) -> list[SamplingParams]:
    """Settings that differ in everything, each filter off now and then."""
    rng = np.random.default_rng(1)
    return [
        SamplingParams(
            int(rng.integers(1, most + 1)),
            stop_id,
            0,
            temperature=float(rng.choice([0.0, rng.uniform(0.1, 2)])),
            top_k=int(rng.choice([0, rng.integers(1, words)])),
            top_p=float(rng.choice([1.0, rng.uniform(0.1, 1)])),
            min_p=float(rng.choice([0.0, rng.uniform(0, 0.5)])),
            stop_after=int(rng.integers(0, 3)),
            stop_ids=tuple(int(i) for i in rng.integers(0, words, rng.integers(0, 6))),
        )
        for _ in range(count)
    ]
