"""Groups of responses on a mesh, with the pretraining mix, by the product and by loops in float64.

For one process and for several.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tiny import VOCAB, experience, token_batch

from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.algorithms.language_modelling import LanguageModelling, predicted
from rlhfjax.algorithms.objective import Mix, MixedBatch
from rlhfjax.algorithms.packing import packed_experience
from rlhfjax.algorithms.rloo import Rloo
from rlhfjax.sharding import batch_sharding, constrain_parts, put, replicated
from rlhfjax.training.update import gradients
from rlhfjax.types import Rollout

ROWS, GROUP, WIDTH, PARTS, KL = 16, 4, 6, 8, 0.3
CLIP, HIGH, BETA, OVERLONG, PTX = 0.2, 0.28, 0.1, 3, 0.5
SCORES = [1, 2, 3, 6, 5, 5, 5, 5, -1, 0, 0, 1, 0.5, 0.25, -4, 2]  # the second group has nothing to prefer


def made() -> tuple[Rollout, np.ndarray]:
    """A scored rollout of ragged responses in numpy, and log-probabilities by token, of a policy that has moved."""
    rollout = jax.tree.map(np.asarray, experience(ROWS, 3, WIDTH).rollout)
    prompts = {name: np.repeat(getattr(rollout, name)[::GROUP], GROUP, axis=0) for name in ("prompt", "prompt_mask")}
    rollout = replace(rollout, scores=np.asarray(SCORES, np.float32), **prompts)
    return rollout, np.random.default_rng(5).normal(-np.log(VOCAB), 0.3, VOCAB).astype(np.float32)


def _log_probs(params, rows):
    x = params["policy"][rows.tokens]
    return x, jnp.zeros_like(x)


ALGORITHMS = {
    "grpo": Grpo(
        *(_log_probs, GROUP, CLIP, HIGH, BETA, "population", "token", WIDTH, OVERLONG),
        dynamic_sampling=True,
        missing_eos="keep",
    ),
    "rloo": Rloo(_log_probs, GROUP, CLIP, "sequence", missing_eos="keep"),
}


def _cross_entropy(params, batch, key):
    return -jnp.where(predicted(batch), params["policy"][batch.tokens[:, 1:]], 0.0).sum()


def on_mesh(mesh) -> dict[str, dict[str, list]]:
    """By algorithm: the advantage of each response, the loss, and its gradient by token."""
    rollout, table = made()
    texts = jax.tree.map(np.asarray, token_batch(ROWS, 6))
    rows, texts = jax.tree.map(lambda x: put(x, batch_sharding(mesh)), (rollout, texts))
    pack = partial(packed_experience, PARTS, place=partial(constrain_parts, mesh), group=GROUP)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def run(rollout, texts, params):
        found = {}
        for name, algorithm in ALGORITHMS.items():
            experience, _ = algorithm.estimate(rollout, jnp.float32(KL))
            mix, both = Mix(algorithm, PTX, LanguageModelling(_cross_entropy)), MixedBatch(experience, texts)
            grads, metrics = gradients(mix, params, both, jax.random.key(0), pack=pack)
            found[name] = {
                "advantages": experience.advantages[:, 0],
                "loss": metrics["loss/total"],
                "gradient": grads["policy"],
            }
        return found

    found = run(rows, texts, {"policy": put(table, replicated(mesh))})
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), found)


def by_loops() -> dict[str, dict[str, list]]:
    """The same in float64; the gradient by differences."""
    rollout, table = made()
    old, ref = (np.asarray(x, np.float64) for x in (rollout.log_probs, rollout.ref_log_probs))
    real = [np.flatnonzero(mask) for mask in rollout.response_mask]
    kl = np.asarray([(old[i, t] - ref[i, t]).sum() for i, t in enumerate(real)])
    excess = np.asarray([max(0, len(t) - (WIDTH - OVERLONG)) / OVERLONG for t in real])
    texts, found = token_batch(ROWS, 6), {}
    own = np.asarray(texts.segments[:, 1:] == texts.segments[:, :-1]) & np.asarray(texts.loss_mask[:, 1:])
    targets = np.asarray(texts.tokens)[:, 1:][own]
    for name, losses, extra in (("grpo", _grpo, excess), ("rloo", _rloo, 0.0)):
        rewards = (np.asarray(SCORES, np.float64) - KL * kl - extra).reshape(-1, GROUP)
        centred = rewards - rewards.mean(axis=1, keepdims=True)
        if name == "grpo":
            alike = np.repeat([len(set(SCORES[i : i + GROUP])) == 1 for i in range(0, ROWS, GROUP)], GROUP)
            advantages = np.where(alike, 0, (centred / rewards.std(axis=1, keepdims=True)).reshape(-1))
        else:
            others = (rewards.sum(axis=1, keepdims=True) - rewards) / (GROUP - 1)
            alike, advantages = np.zeros(ROWS, bool), (rewards - others).reshape(-1)

        def loss(table, losses=losses, advantages=advantages, alike=alike):
            each = [
                losses(table[rollout.response[i, t]], old[i, t], ref[i, t], advantages[i])
                for i, t in enumerate(real)
                if not alike[i]
            ]
            return sum(x for x, _ in each) / sum(count for _, count in each) - PTX * table[targets].mean()

        table64, step = np.asarray(table, np.float64), 1e-6
        slopes = [(loss(table64 + step * e) - loss(table64 - step * e)) / (2 * step) for e in np.eye(VOCAB)]
        found[name] = {"advantages": advantages.tolist(), "loss": loss(table64), "gradient": slopes}
    return found


def _grpo(new, old, ref, advantage):
    ratio = np.exp(new - old)
    policy = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - CLIP, 1 + HIGH))
    return (policy + BETA * (np.exp(ref - new) - 1 - (ref - new))).sum(), len(new)


def _rloo(new, old, ref, advantage):
    ratio = np.exp((new - old).sum())
    return max(-advantage * ratio, -advantage * np.clip(ratio, 1 - CLIP, 1 + CLIP)), 1
