"""Losses on human rankings: the K-wise reward-model loss and direct preference optimisation.

Ranks are integers, 1 the best, equal ranks a tie. `mask` is True on the candidates that are there, so prompts with
different K share a batch. A prompt with fewer than two candidates has nothing to compare: it is padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.masking import Scalar, masked_mean


def ranking_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"] | None = None,
    kind: str = "logistic",
    margin: Scalar = 0.0,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """Reward-model loss, a mean over prompts of 1/C(K,2) Σ_{w≻l} ℓ(s_w − s_l); ties drop out, C counts the K present.

    With Δ = s_w − s_l and margin m, ℓ is: logistic −log σ(Δ − m) · hinge max(0, m − Δ) · exp e^(m − Δ) · squared
    (m − Δ)². Hinge and squared say nothing without m > 0: equal scores already minimise them. `plackett_luce` is the
    listwise likelihood instead: each candidate against those ranked strictly below it, as a mean over the choices made;
    it is logistic for K = 2 and softmax cross-entropy for "best of K, rest tied" (Ziegler et al. 2019).
    `normalizer` is the number of prompts of the whole update (`ranked_prompts`), in place of the local one.
    Raises ValueError on another kind. Source: Ouyang et al. 2022, eq. 1; Plackett 1975 (listwise).
    """
    present = _present(scores, mask)
    scores = jnp.asarray(scores, jnp.float32)
    ordered = better(ranks, present)
    margin = jnp.asarray(margin, jnp.float32)
    if kind == "plackett_luce":
        return masked_mean(_plackett_luce(scores, ordered, margin), _comparable(present), normalizer=normalizer)
    # Selected before the loss: the gap of an absent candidate may be NaN, and must not reach the gradient.
    gap = jnp.where(ordered, scores[:, :, None] - scores[:, None, :] - margin, 0.0)
    return mean_of_pairs(_pair_loss(gap, kind), ranks, present, normalizer=normalizer)


def mean_of_pairs(
    losses: Float[Array, "B K K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"] | None = None,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """Mean over prompts of 1/C(K,2) Σ_{w≻l} losses[w, l]; ties drop out, C counts the K present.

    `normalizer` as in `ranking_loss`. Source: Ouyang et al. 2022, eq. 1.
    """
    present = _present(ranks, mask)
    count = jnp.sum(present, axis=-1, dtype=jnp.float32)
    pairs = jnp.where(count > 1, count * (count - 1) / 2, 1.0)
    per_prompt = jnp.sum(jnp.where(better(ranks, present), losses, 0.0), axis=(-2, -1)) / pairs
    return masked_mean(per_prompt, _comparable(present), normalizer=normalizer)


def ranked_prompts(scores: Float[Array, "B K"], mask: Bool[Array, "B K"] | None = None) -> Float[Array, ""]:
    """Number of prompts with at least two candidates: what `ranking_loss` divides by."""
    return jnp.sum(_comparable(_present(scores, mask)), dtype=jnp.float32)


def ranked_pairs(ranks: Int[Array, "B K"], mask: Bool[Array, "B K"] | None = None) -> Float[Array, ""]:
    """Number of pairs that the labelers told apart: what `pairwise_accuracy` divides by."""
    return jnp.sum(better(ranks, _present(ranks, mask)), dtype=jnp.float32)


def pairwise_accuracy(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"] | None = None,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """Share of the pairs labelers told apart that the scores order alike; equal scores count one half."""
    present = _present(scores, mask)
    scores = jnp.asarray(scores, jnp.float32)
    agreement = 0.5 * (1.0 + jnp.sign(scores[:, :, None] - scores[:, None, :]))
    return masked_mean(agreement, better(ranks, present), normalizer=normalizer)


def dpo_loss(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    beta: Scalar,
    kind: str = "sigmoid",
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "B"]:
    """Direct preference loss of each pair, from log-probabilities summed over the response, in nats.

    With h = (log π − log π_ref)(chosen) − (log π − log π_ref)(rejected): sigmoid −log σ(β h) (Rafailov et al. 2023,
    eq. 7) · hinge max(0, 1 − β h) (Zhao et al. 2023) · ipo (h − 1/(2β))² (Azar et al. 2024, eq. 17).
    `label_smoothing` ε is the chance that a label is flipped: the loss is (1 − ε) ℓ(h) + ε ℓ(−h), any kind (for sigmoid
    conservative DPO, Mitchell 2023). Raises ValueError on another kind.
    """
    chosen, rejected, ref_chosen, ref_rejected = (
        jnp.asarray(x, jnp.float32) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    )
    beta, smoothing = jnp.asarray(beta, jnp.float32), jnp.asarray(label_smoothing, jnp.float32)
    gap = (chosen - ref_chosen) - (rejected - ref_rejected)

    def loss(h: Array) -> Array:
        match kind:
            case "sigmoid":
                return jax.nn.softplus(-beta * h)
            case "hinge":
                return jax.nn.relu(1.0 - beta * h)
            case "ipo":
                return jnp.square(h - 1.0 / (2.0 * beta))
        raise ValueError(f"expected kind 'sigmoid', 'hinge' or 'ipo', got {kind!r}")

    return (1.0 - smoothing) * loss(gap) + smoothing * loss(-gap)


def implicit_reward(log_probs: Float[Array, "B"], ref_log_probs: Float[Array, "B"], beta: Scalar) -> Float[Array, "B"]:
    """Reward that a directly optimised policy stands for, up to a term of the prompt: β (log π − log π_ref).

    Source: Rafailov et al. 2023, eq. 5.
    """
    log_ratio = jnp.asarray(log_probs, jnp.float32) - jnp.asarray(ref_log_probs, jnp.float32)
    return jnp.asarray(beta, jnp.float32) * log_ratio


def _present(like: Array, mask: Array | None) -> Bool[Array, "B K"]:
    return jnp.ones(jnp.shape(like), bool) if mask is None else jnp.asarray(mask).astype(bool)


def _comparable(present: Bool[Array, "B K"]) -> Bool[Array, "B"]:
    return jnp.sum(present, axis=-1, dtype=jnp.int32) > 1


def better(ranks: Int[Array, "B K"], present: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """[b, w, l] is True where candidate w was ranked strictly above candidate l and both are there."""
    ranks, present = jnp.asarray(ranks), jnp.asarray(present).astype(bool)
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]


def _pair_loss(gap: Float[Array, "B K K"], kind: str) -> Float[Array, "B K K"]:
    match kind:
        case "logistic":
            return jax.nn.softplus(-gap)
        case "hinge":
            return jax.nn.relu(-gap)
        case "exp":
            return jnp.exp(-gap)
        case "squared":
            return jnp.square(gap)
    raise ValueError(f"expected kind 'logistic', 'hinge', 'exp', 'squared' or 'plackett_luce', got {kind!r}")


def _plackett_luce(
    scores: Float[Array, "B K"], better: Bool[Array, "B K K"], margin: Float[Array, ""]
) -> Float[Array, "B"]:
    """Mean over choices of log(1 + Σ_{l below w} exp(s_l − s_w + m)); tied candidates never meet in one choice."""
    gap = jnp.where(better, scores[:, None, :] - scores[:, :, None] + margin, -jnp.inf)
    with_itself = jnp.concatenate([jnp.zeros_like(gap[:, :, :1]), gap], axis=-1)
    return masked_mean(jax.nn.logsumexp(with_itself, axis=-1), jnp.any(better, axis=-1), axis=-1)
