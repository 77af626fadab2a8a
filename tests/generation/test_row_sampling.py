"""Settings that differ by row against a loop over rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.generation import SamplingParams
from rlhfjax.generation.sampling import by_row, draw, uniforms


def asked(**changes) -> SamplingParams:
    return replace(SamplingParams(max_new_tokens=12, stop_id=5, pad_id=0), **changes)


SETTINGS = [
    asked(),
    asked(temperature=0.0, top_k=3),
    asked(temperature=0.3),
    asked(top_k=1),
    asked(temperature=1.7, top_k=5),
    asked(top_p=0.4),
    asked(temperature=0.6, top_p=0.95),
    asked(min_p=0.2),
    asked(temperature=1.3, top_k=300, top_p=0.9, min_p=0.02),
    asked(temperature=2.0, top_k=270),
    asked(temperature=3.0, top_p=0.97),
    asked(temperature=1e-30, top_p=0.5),
]


def numpy_kept(logits: np.ndarray, s: SamplingParams) -> list[int]:
    """The ids that the filters of one row leave, one after the other."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: s.top_k or None]
    kept, mass, weights = [], 0.0, np.exp(logits[order] - logits[order[0]])
    for token, share in zip(order, weights / weights.sum(), strict=True):
        if kept and s.top_p < 1 and mass >= s.top_p:
            break
        kept.append(token)
        mass += share
    best = logits[kept[0]]
    return [token for token in kept if np.exp(logits[token] - best) >= s.min_p]


def numpy_draw(noise: np.ndarray, logits: np.ndarray, s: SamplingParams) -> tuple[int, float]:
    """One row in float64: a block of every N-th token by the first number, one of its tokens by the second."""
    logits = logits.astype(np.float64) / (s.temperature or 1.0)
    log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    if s.temperature == 0:
        return int(log_probs.argmax()), float(log_probs.max())
    weights = np.zeros(len(logits))
    kept = numpy_kept(logits, s)
    weights[kept] = np.exp(log_probs[kept])
    blocks = max(16, 2 ** round(np.log2(len(logits)) / 2))
    sums = np.asarray([weights[n::blocks].sum() for n in range(blocks)])
    block = int(np.argmax(np.cumsum(sums) > noise[0] * sums.sum()))
    inside = weights[block::blocks]
    token = block + blocks * int(np.argmax(np.cumsum(inside) > noise[1] * inside.sum()))
    return token, float(log_probs[token])


# 600 words: cut off among the likeliest tokens, beyond them, and by a sort of all
@pytest.mark.parametrize("vocabulary", [16, 600])
def test_rows_of_other_settings_draw_what_a_loop_over_rows_draws(vocabulary):
    # fails when a setting is that of a neighbour, or a filter's order is another; and when log-probabilities are of
    # what the filters left
    settings = SETTINGS * 8
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(0, 1.5, (len(settings), vocabulary)).astype(np.float32)
    noise = np.asarray(uniforms(jax.random.key(7), jnp.arange(len(settings), dtype=jnp.int32), 1))[:, 0]
    run = jax.jit(draw)
    made = jax.device_get(run(noise, logits, by_row(settings, 4)))
    for row, one in enumerate(settings):
        token, log_prob = numpy_draw(noise[row].astype(np.float64), logits[row], one)
        assert made.token[row] == token
        assert made.log_prob[row] == pytest.approx(log_prob, rel=1e-4, abs=1e-5)
    # and alone the same
    for row in range(len(SETTINGS)):
        alone = run(noise[row : row + 1], logits[row : row + 1], by_row(settings[row : row + 1], 4))
        assert int(alone.token[0]) == made.token[row]
        np.testing.assert_allclose(alone.log_prob[0], made.log_prob[row], rtol=1e-5, atol=1e-6)
