"""Groups of responses for the tests of GRPO and RLOO: ragged, of equal scores, and as packed rows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tiny import experience

from rlhfjax.algorithms.packing import packed_experience
from rlhfjax.functional import token_log_probs
from rlhfjax.types import Experience, Rollout, TokenExperience

ROWS, WIDTH, GROUP = 12, 5, 4
_MADE = experience(ROWS, 3, WIDTH).rollout
_SHARED = (jnp.repeat(x[::GROUP], GROUP, axis=0) for x in (_MADE.prompt, _MADE.prompt_mask))
ROLLOUT = replace(_MADE, **dict(zip(("prompt", "prompt_mask"), _SHARED, strict=True)))
MASK = np.asarray(ROLLOUT.response_mask)
LENGTHS = MASK.sum(axis=1)
SCORES = [1, 2, 3, 6, 5, 5, 5, 5, -1, 0, 0, 1]  # the second group has nothing to prefer


def estimated(algorithm, scores=SCORES, kl_coef=0.0, rollout=ROLLOUT):
    """(experience, metrics) of these scores."""
    rollout = replace(rollout, scores=jnp.asarray(scores, jnp.float32))
    return jax.jit(algorithm.estimate)(rollout, jnp.float32(kl_coef))


def table() -> dict[str, jax.Array]:
    """Logits of each position of each row."""
    return {"policy": jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, WIDTH, 16)), jnp.float32)}


def on_policy(made: Experience) -> Experience:
    """The experience as if that table had sampled it: ratios are 1."""
    log_probs = token_log_probs(table()["policy"], made.rollout.response)
    return replace(made, rollout=replace(made.rollout, log_probs=log_probs))


def loss_and_gradient(algorithm, made, params=None):
    """(loss, metrics, gradient) over a batch that is whole."""
    compute = jax.jit(jax.value_and_grad(lambda p: algorithm.loss(p, made, algorithm.weight(made)), has_aux=True))
    (loss, metrics), gradient = compute(table() if params is None else params)
    return float(loss), metrics, np.asarray(gradient["policy"])


def moved(shift, rows):
    """Log-probabilities after an update that moves those of each token by `shift` times a number, and entropies."""
    ids = (rows.response if isinstance(rows, Rollout) else rows.tokens).astype(jnp.float32)
    return shift * jnp.cos(ids) - 2.7, jnp.sin(ids)


def packings(made: Experience) -> list[TokenExperience]:
    """All of it as packed rows: each response with its prompt, and the responses of a group after their prompt."""
    parts = [_packed(group, made) for group in (1, GROUP)]
    assert all(int(used) == 1 for _, used in parts)
    return [jax.tree.map(lambda x: x[0], packed) for packed, _ in parts]


@partial(jax.jit, static_argnums=0)
def _packed(group, made):
    return packed_experience(ROWS // group, made, group=group)


def loss_of(algorithm, shift, batch, whole=None):
    """(loss, metrics) of a batch, or of part of the `whole` one."""

    @jax.jit
    def compute(batch, weight):
        return algorithm.loss(jnp.float32(shift), batch, weight)

    return compute(batch, algorithm.weight(batch if whole is None else whole))


def float64(made: Experience, shift: float):
    """(log p after `moved`, before, of the reference, advantage) of the tokens of each response."""
    arrays = made.rollout.log_probs, made.rollout.ref_log_probs, made.advantages
    old, ref, advantages = (np.asarray(x, np.float64) for x in arrays)
    new = shift * np.cos(np.asarray(made.rollout.response, np.float64)) - 2.7
    rows = [np.flatnonzero(row) for row in np.asarray(made.mask)]
    return [(new[i, t], old[i, t], ref[i, t], advantages[i, t]) for i, t in enumerate(rows)]
