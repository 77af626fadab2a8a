"""Mixture-of-experts feed-forward: a router, and two exact ways of taking tokens to their experts and back.

`dropless` computes every assignment. `bounded` gives each expert a fixed number of slots a row and drops what is over;
the residual stream carries dropped tokens past the block.
"""

import math
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.types import Routing

if TYPE_CHECKING:
    from rlhfjax.models.layers import DecoderConfig

Kernels = tuple[Array, Array, Array]  # gate and up [E, D, F], down [E, F, D]


def route(
    logits: Float[Array, "*B E"], experts_per_token: int, norm_topk: bool
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """The k likeliest experts of each token and their weights, softmax(logits) at those experts.

    With `norm_topk` the k weights are divided by their sum (Jiang et al. 2024, section 2.1).
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    if norm_topk:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, chosen


def capacity(factor: float, length: int, experts: int, experts_per_token: int) -> int:
    """Slots of an expert in one row of `length` tokens: ceil(factor x k x length / E), at most `length`.

    A row is a group of its own (Lepikhin et al. 2021, section 3.1), so what is dropped depends on no other row.
    """
    return min(length, math.ceil(factor * experts_per_token * length / experts))


@jax.custom_vjp
def dropless(
    x: Float[Array, "*B D"], weights: Float[Array, "*B K"], chosen: Int[Array, "*B K"], kernels: Kernels
) -> Float[Array, "*B D"]:
    """Σ_k weight_k · expert_k(x): assignments sorted by expert, one grouped matrix product for each of the kernels."""
    return _mapped(x, weights, chosen, kernels)


def _sorted(x: Array, weights: Array, chosen: Array, kernels: Kernels) -> Array:
    gate, up, down = kernels
    width, per_token = x.shape[-1], chosen.shape[-1]
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=gate.shape[0]).astype(jnp.int32)
    # Copies before the permutation: its gradient then adds no two rows, and no order of adding can matter.
    copies = jnp.repeat(x.reshape(-1, width), per_token, axis=0)
    rows = copies.at[order].get(unique_indices=True, mode="promise_in_bounds")
    hidden = nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes)
    out = out.at[jnp.argsort(order)].get(unique_indices=True, mode="promise_in_bounds")
    return _weighted(out.reshape(*chosen.shape, width), weights)


@jax.custom_batching.custom_vmap
def _mapped(x: Array, weights: Array, chosen: Array, kernels: Kernels) -> Array:
    return _sorted(x, weights, chosen, kernels)


@_mapped.def_vmap
def _map(size: int, mapped: Any, x: Array, weights: Array, chosen: Array, kernels: Kernels) -> tuple[Array, bool]:
    # `ragged_dot` cannot be mapped over one factor alone, but tokens of a mapped axis are only more tokens.
    if any(mapped[3]):
        raise NotImplementedError("experts are mapped over tokens, not over parameters")
    inputs = [
        v if m else jnp.broadcast_to(v, (size, *v.shape)) for v, m in zip((x, weights, chosen), mapped[:3], strict=True)
    ]
    return _sorted(inputs[0], inputs[1], inputs[2], kernels), True


# What can be mapped by a rule of its own cannot be differentiated, so the gradient is that of what is behind the rule.
dropless.defvjp(lambda *inputs: jax.vjp(_sorted, *inputs), lambda pullback, out: pullback(out))


def bounded(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T K"],
    chosen: Int[Array, "B T K"],
    real: Bool[Array, "B T"],
    kernels: Kernels,
    slots: int,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """The same sum without the assignments that find their expert's `slots` taken, and how many those are.

    All first choices of a row are served before any second choice, each in the order of the tokens (Lepikhin et al.
    2021, algorithm 1); weights of what is left are not raised. Padding takes no slot.
    """
    gate, up, down = kernels
    experts, (batch, length, per_token) = gate.shape[0], chosen.shape
    expert = chosen.swapaxes(1, 2).reshape(batch, per_token * length)
    wanted = jnp.tile(real, (1, per_token))
    queue = jax.nn.one_hot(expert, experts, dtype=jnp.int32) * wanted[..., None].astype(jnp.int32)
    place = jnp.take_along_axis(jnp.cumsum(queue, axis=1), expert[..., None], axis=-1)[..., 0] - 1
    kept = wanted & (place < slots)
    # What is not kept gets a slot beyond the end, a different one each: written nowhere, read as 0.
    beyond = experts * slots + jnp.arange(per_token * length, dtype=jnp.int32)[None, :]
    slot = jnp.where(kept, expert * slots + place, beyond)

    def dispatch(rows, slot):
        empty = jnp.zeros((experts * slots, rows.shape[-1]), rows.dtype)
        return empty.at[slot].set(rows, unique_indices=True, mode="drop")

    def combine(rows, slot):
        return rows.at[slot].get(unique_indices=True, mode="fill", fill_value=0)

    inputs = jax.vmap(dispatch)(jnp.tile(x, (1, per_token, 1)), slot).reshape(batch, experts, slots, -1)
    hidden = nn.silu(jnp.einsum("becd,edf->becf", inputs, gate)) * jnp.einsum("becd,edf->becf", inputs, up)
    out = jnp.einsum("becf,efd->becd", hidden, down).reshape(batch, experts * slots, -1)
    out = jax.vmap(combine)(out, slot).reshape(batch, per_token, length, -1).swapaxes(1, 2)
    return _weighted(out, weights), (wanted & ~kept).sum().astype(jnp.float32)


def _weighted(out: Float[Array, "*B K D"], weights: Float[Array, "*B K"]) -> Float[Array, "*B D"]:
    # The sum over experts is float32, like every other sum that is small and cheap.
    return (out.astype(jnp.float32) * weights[..., None]).sum(axis=-2).astype(out.dtype)


class Kernel(nn.Module):
    """A matrix, or one an expert: a leaf named like that of any other layer."""

    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.normal(self.std), self.shape)


class Experts(nn.Module):
    """SwiGLU experts behind a softmax router, in the place of the feed-forward block.

    The router's product and softmax are float32 (Fedus et al. 2022, section 2.4). What it did with real tokens is sown
    into the collection `routing` where that is asked for.
    """

    config: "DecoderConfig"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        logits = x.astype(jnp.float32) @ Kernel((c.width, c.experts), c.init_std, name="router")()
        weights, chosen = route(logits, c.experts_per_token, c.norm_topk)
        inner, outer = (c.experts, c.width, c.mlp_width), (c.experts, c.mlp_width, c.width)
        gate = Kernel(inner, c.init_std, name="gate")().astype(c.compute_dtype)
        up = Kernel(inner, c.init_std, name="up")().astype(c.compute_dtype)
        down = Kernel(outer, c.init_std / (2 * c.layers) ** 0.5, name="down")().astype(c.compute_dtype)
        if c.capacity_factor is None:
            out, dropped = dropless(x, weights, chosen, (gate, up, down)), jnp.float32(0.0)
        else:
            slots = capacity(c.capacity_factor, x.shape[1], c.experts, c.experts_per_token)
            out, dropped = bounded(x, weights, chosen, real, (gate, up, down), slots)
        if self.is_mutable_collection("routing"):
            routing = routing_of(logits, chosen, real, dropped)
            self.sow("routing", "of", routing, init_fn=lambda: routing, reduce_fn=lambda _, new: new)
        return out


def routing_of(
    logits: Float[Array, "B T E"], chosen: Int[Array, "B T K"], real: Bool[Array, "B T"], dropped: Float[Array, ""]
) -> Routing:
    """The sums that losses and metrics of one layer are made of."""
    mask = real.astype(jnp.float32)
    picked = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32).sum(axis=-2)
    return Routing(
        assigned=(picked * mask[..., None]).sum(axis=(0, 1)),
        probabilities=(jax.nn.softmax(logits, axis=-1) * mask[..., None]).sum(axis=(0, 1)),
        squared_z=(jax.nn.logsumexp(logits, axis=-1) ** 2 * mask).sum(),
        dropped=dropped,
        tokens=mask.sum(),
    )
