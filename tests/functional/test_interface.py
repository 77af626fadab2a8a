"""The promised names and signatures, to the letter."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import functional

SIGNATURES = {
    "masked_mean": "x, mask",
    "whiten": "x, mask, shift_mean=True",
    "token_log_probs": "logits, tokens, temperature=1.0",
    "smoothed_cross_entropy": "logits, tokens, smoothing",
    "entropy": "logits, temperature=1.0",
    "kl_estimate": "log_probs, ref_log_probs, kind",
    "kl_penalized_rewards": "scores, log_probs, ref_log_probs, mask, kl_coef",
    "gae": "rewards, values, mask, gamma, lam",
    "clipped_surrogate": "log_probs, old_log_probs, advantages, mask, clip",
    "clipped_value_loss": "values, old_values, returns, mask, clip",
    "ranking_loss": "scores, ranks, mask=None, kind='logistic', margin=0.0",
    "dpo_loss": "policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, kind='sigmoid', label_smoothing=0.0",
    "group_relative": "scores",
    "leave_one_out": "scores",
    "adaptive_kl": "kl_coef, kl, *, target, horizon, episodes",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    added = ("axis", "normalizer", "deviation", "present")
    promised = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.name not in added]
    assert str(inspect.Signature(promised)) == f"({SIGNATURES[name]})"


def test_every_name_is_exported():
    assert set(SIGNATURES) <= set(functional.__all__)
    assert all(hasattr(functional, name) for name in functional.__all__)


X, MASK = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), jnp.array([[True, True, False], [True, False, False]])
SCORES, RANKS = X[:, 0], jnp.array([[1, 2, 2], [3, 1, 2]])
CALLS = {
    "masked_mean": lambda f, s: f(X, MASK, normalizer=s),
    "token_log_probs": lambda f, s: f(X, RANKS[:, 0] - 1, s),
    "smoothed_cross_entropy": lambda f, s: f(X, RANKS[:, 0] - 1, s),
    "entropy": lambda f, s: f(X, s),
    "kl_penalized_rewards": lambda f, s: f(SCORES, X, -X, MASK, s),
    "gae": lambda f, s: f(X, -X, MASK, s, s),
    "clipped_surrogate": lambda f, s: f(X, -X, X, MASK, s, normalizer=s),
    "clipped_value_loss": lambda f, s: f(X, -X, X, MASK, s, normalizer=s),
    "ranking_loss": lambda f, s: f(X, RANKS, MASK, "hinge", s, normalizer=s),
    "dpo_loss": lambda f, s: f(SCORES, SCORES, -SCORES, SCORES, s, "ipo", s),
    "adaptive_kl": lambda f, s: f(s, s, target=s, horizon=s, episodes=s),
}


@pytest.mark.parametrize("name", CALLS)
def test_scalars_may_be_traced_and_results_are_float32(name):
    # fails if a coefficient must be known when the step is compiled: seen
    call, function = CALLS[name], getattr(functional, name)
    compiled, eager = jax.jit(lambda s: call(function, s))(jnp.float32(0.3)), call(function, 0.3)
    for traced, known in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        assert traced.dtype == known.dtype == jnp.float32
        np.testing.assert_allclose(traced, known, rtol=1e-5, atol=1e-6)
