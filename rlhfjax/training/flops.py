"""Use of the machine: floating-point operations of the model over those that the devices could do.

Model FLOPs are those of the equations on real tokens: padding, recomputation (remat) and whatever the compiler adds do
not count (Chowdhery et al. 2022, appendix B). Attention counts what a causal token sees, which is half of the square.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.types import Params, RankedBatch, Rollout, TokenBatch

# Dense bf16 products, FLOP/s of one device as the makers publish them; the first name that a device's kind holds.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass of a decoder: 2 a weight and token, 4 a head's width, head, layer and pair of tokens.

    `weights` are of the matrices that one token meets inside the blocks, `vocabulary` those of the unembedding,
    `attention` is layers x heads x head_dim.
    """

    weights: float
    vocabulary: float
    attention: float

    def __call__(self, tokens: float, pairs: float, predicted: float = 0.0) -> float:
        """Of `tokens` tokens that see `pairs` tokens together; logits are needed at `predicted` of them."""
        return 2 * (self.weights * tokens + self.vocabulary * predicted) + 4 * self.attention * pairs


def forward_flops(config: Any, params: Params) -> ForwardFlops:
    """Of a decoder's configuration and its parameters, arrays or shapes; adapters count, unused experts do not."""
    weights = vocabulary = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        if "blocks" in names and names[-1] in ("kernel", "lora_a", "lora_b"):
            idle = "experts" in names and "router" not in names
            weights += leaf.size * (config.experts_per_token / config.experts if idle else 1.0)
        elif names[-2:] == ["unembed", "kernel"] or (config.tied and names[-2:] == ["embed", "embedding"]):
            vocabulary += leaf.size
    return ForwardFlops(weights, vocabulary, config.layers * config.heads * config.head_dim)


def attended(positions: Int[Array, "*B T"], real: Bool[Array, "*B T"]) -> Float[Array, ""]:
    """Σ over real tokens of the tokens that each sees, itself included; a window is not taken off."""
    return (jnp.where(real, positions + 1, 0)).sum(dtype=jnp.float32)


def seen_by(batch: TokenBatch | RankedBatch | Rollout) -> dict[str, Array]:
    """The counts that FLOPs are worked out from, as metrics that the loops take out again.

    A prompt counts once for all its candidates, however often it is read.
    """
    if isinstance(batch, TokenBatch):
        return {"work/pairs": attended(batch.positions, batch.segments > 0)}
    if isinstance(batch, RankedBatch):
        real, prompts = batch.token_mask & batch.mask[:, :, None], batch.prompt_lengths.astype(jnp.float32)
        again = jnp.maximum(batch.mask.sum(axis=1) - 1, 0).astype(jnp.float32)
        pairs = attended(jnp.cumsum(real, axis=-1) - 1, real) - (again * prompts * (prompts + 1) / 2).sum()
        return {"work/pairs": pairs, "work/tokens": real.sum(dtype=jnp.float32) - (again * prompts).sum()}
    real = jnp.concatenate([batch.prompt_mask, batch.response_mask], axis=1)
    pairs = attended(jnp.cumsum(real, axis=-1) - 1, real)
    return {"work/prompt": batch.prompt_mask.sum(dtype=jnp.float32), "work/pairs": pairs}


@dataclass(frozen=True)
class OfflineFlops:
    """FLOPs of a step of an offline stage: the forward pass, and twice that backward where all is trained."""

    model: ForwardFlops
    frozen: bool = False  # the backward pass through weights that nothing trains costs as much as the forward pass
    predicts: bool = True  # logits of every token; a reward model has none

    def __call__(self, counts: Mapping[str, float]) -> float:
        tokens = counts.get("work/tokens", counts["tokens"])
        forward = self.model(tokens, counts["work/pairs"], tokens if self.predicts else 0.0)
        return (2 if self.frozen else 3) * forward


@dataclass(frozen=True)
class OnlineFlops:
    """FLOPs of an online iteration: sampling, one pass of every model, updates of policy and (if any) value model."""

    policy: ForwardFlops
    value: ForwardFlops | None
    rewards: tuple[ForwardFlops, ...]
    frozen: bool = False
    policy_passes: int = 2  # to score: the reference and, where they are recomputed, the old log-probabilities
    pretraining_tokens: float = 0.0  # of ptx, in one epoch, each seeing `pretraining_pairs` / tokens others
    pretraining_pairs: float = 0.0

    def __call__(self, counts: Mapping[str, float]) -> float:
        """From `tokens` (of responses), `work/prompt`, `work/pairs` and `policy/epochs_run`."""
        tokens, pairs = counts["work/prompt"] + counts["tokens"], counts["work/pairs"]
        policy = self.policy(tokens, pairs, counts["tokens"])
        value = self.value(tokens, pairs) if self.value else 0.0
        reward = sum(model(tokens, pairs) for model in self.rewards)
        mixed = self.policy(self.pretraining_tokens, self.pretraining_pairs, self.pretraining_tokens)
        trained = counts["policy/epochs_run"] * (policy + value + mixed)
        return policy + self.policy_passes * policy + value + reward + (2 if self.frozen else 3) * trained


@cache
def machine_peak() -> float:
    """FLOP/s that all devices can do together: published for known accelerators, else of a matrix product, measured.

    The product takes a tenth of a second, once a process. The devices of a CPU share its cores and count as one.
    """
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if kind.lower() in device.device_kind.lower():
            return peak * jax.device_count()
    measured = _measured(device)
    return measured * (jax.process_count() if device.platform == "cpu" else jax.device_count())


def _measured(device: Any) -> float:
    """FLOP/s of a matrix product, the fastest of a few."""
    size, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    jax.block_until_ready(product(matrix))
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(product(matrix))
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
