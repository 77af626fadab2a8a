"""How long a response may get that is drawn to measure by it: what its own prompt leaves."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import schema
from rlhfjax.stages.measures.draws import draws_of

END, CONTEXT = 1, 32
TOKENIZER = SimpleNamespace(end_ids=(END,), pad_id=0)


@dataclass(frozen=True)
class Bigram:
    """Logits of the next token are row `token` of the parameters."""

    def arrange(self, params, rows=None):
        return params

    def prefill(self, params, prompt, prompt_mask, new_tokens):
        return params[prompt[:, -1]], prompt[:, -1]

    def decode(self, params, cache, tokens):
        return params[tokens], tokens


ENDLESS = jnp.asarray(np.random.default_rng(0).normal(size=(9, 9)), jnp.float32).at[:, END].set(-jnp.inf)


def draws(prompts, sampling=None):
    """Of a stage with rows of 24 tokens, in a recipe with or without an online stage."""
    return draws_of(sampling and schema.Sampling(**sampling), TOKENIZER, prompts, CONTEXT, 24)


def drawn(prompts, sampling=None, table=ENDLESS):
    return draws([[7] * count for count in prompts], sampling).of(Bigram(), table, jax.random.key(0))


@pytest.mark.parametrize(
    ("sampling", "prompts", "lengths"),
    [
        (None, [3, 22, 5, 23], [21, 2, 19, 1]),  # 24 less the prompt
        ({"max_new_tokens": 8}, [3, 22, 5, 28], [8, 8, 8, 4]),  # PPO's, or what is left of 32
    ],
)
def test_each_response_has_a_budget_of_its_own(sampling, prompts, lengths):
    # fails where the widest prompt decides for all: seen (all responses had 2 tokens)
    made = drawn(prompts, sampling)
    assert made.response_mask.sum(axis=1).tolist() == lengths
    assert not made.finished.any()
    assert (made.response[~made.response_mask] == TOKENIZER.pad_id).all()


def test_a_long_prompt_changes_no_other_response():
    few, more = drawn([3, 5, 4]), drawn([3, 5, 4, 22])
    np.testing.assert_array_equal(more.response[:3], few.response)
    np.testing.assert_array_equal(more.sampled_log_probs[:3], few.sampled_log_probs)


def test_a_response_that_ends_within_its_budget_has_ended():
    """7 is followed by 4, and 4 by the end: two tokens, of which the last prompt leaves room for one."""
    table = jnp.full((9, 9), -jnp.inf).at[7, 4].set(0.0).at[4, END].set(0.0)
    made = drawn([3, 23], table=table)
    assert made.response[0, :2].tolist() == [4, END]
    assert made.response_mask.sum(axis=1).tolist() == [2, 1]
    assert made.finished.tolist() == [True, False]


def test_it_samples_as_ppo_does():
    made = draws([[7]], {"max_new_tokens": 8, "temperature": 0.7, "top_k": 5, "speculate": "ngram"})
    found = made.sampling
    assert (found.max_new_tokens, found.temperature, found.top_k, found.stop_id) == (8, 0.7, 5, END)
    assert draws([[7]]).sampling.temperature == 1.0
