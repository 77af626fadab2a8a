"""Mixture-of-experts feed-forward: a router, and two exact ways of taking tokens to their experts and back.

`dropless` computes every assignment. `bounded` gives each expert a fixed number of slots per row and drops what is
over; the residual stream carries dropped tokens past the block.
"""

import math
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.layout import current
from rlhfjax.models.activations import GATED
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.grouped import grouped
from rlhfjax.types import Routing

# Gate and up [E, D, F], down [E, F, D]; where they have biases, three more [E, F], [E, F], [E, D].
Kernels = tuple[Array, ...]


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


def replayed(
    probabilities: Float[Array, "*B E"], own: Int[Array, "*B K"], recorded: Int[Array, "*B K"], norm_topk: bool
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """The experts that were recorded of each token, its `own` where none were, and their weights as `route` has them.

    Where tokens go is recorded; how much each expert weighs is the router's as it is, and so are its gradients (Ma et
    al. 2025, rollout routing replay).
    """
    chosen = jnp.where(recorded >= 0, recorded.astype(own.dtype), own)
    weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True) if norm_topk else weights, chosen


def rerouted(own: Int[Array, "*B K"], recorded: Int[Array, "*B K"]) -> Float[Array, "*B"]:
    """1 where a token's own experts are others than those recorded, 0 where not, -1 where none are; in any order."""
    same = (own[..., :, None] == recorded[..., None, :].astype(own.dtype)).any(axis=-1).all(axis=-1)
    return jnp.where((recorded >= 0).all(axis=-1), 1.0 - same.astype(jnp.float32), -1.0)


def capacity(factor: float, length: int, experts: int, experts_per_token: int) -> int:
    """Slots of an expert in one row of `length` tokens: ceil(factor x k x length / E), at most `length`.

    A row is a group of its own (Lepikhin et al. 2021, section 3.1), so what is dropped depends on no other row.
    """
    return min(length, math.ceil(factor * experts_per_token * length / experts))


def dropless(
    x: Float[Array, "*B D"],
    weights: Float[Array, "*B K"],
    chosen: Int[Array, "*B K"],
    kernels: Kernels,
    activation: str = "swiglu",
) -> Float[Array, "*B D"]:
    """Σ_k weight_k · expert_k(x): assignments sorted by expert, one grouped matrix product for each of the kernels.

    On a mesh, devices compute the experts that they hold.
    """
    layout = current()
    if layout is None or x.ndim != 3:
        return _dropless(activation, x, weights, chosen, kernels)
    program = layout.experts(partial(_fed, activation), partial(_pulled_back, activation))
    return program(x, weights, chosen, kernels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropless(activation: str, x: Array, weights: Array, chosen: Array, kernels: Kernels) -> Array:
    return _mapped(activation)(x, weights, chosen, kernels)


def _sorted(activation: str, x: Array, weights: Array, chosen: Array, kernels: Kernels) -> Array:
    width, per_token = x.shape[-1], chosen.shape[-1]
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=kernels[0].shape[0]).astype(jnp.int32)
    # Copies before the permutation: its gradient then adds no two rows, and no order of adding can matter.
    copies = jnp.repeat(x.reshape(-1, width), per_token, axis=0)
    rows = copies.at[order].get(unique_indices=True, mode="promise_in_bounds")
    out = _fed(activation, expert[order], sizes, rows, kernels)
    out = out.at[jnp.argsort(order)].get(unique_indices=True, mode="promise_in_bounds")
    return _weighted(out.reshape(*chosen.shape, width), weights)


def _fed(
    activation: str,
    expert: Int[Array, "R"],
    sizes: Int[Array, "E"],
    rows: Float[Array, "R D"],
    kernels: Kernels,
    weights: Float[Array, "R"] | None = None,
) -> Float[Array, "R D"]:
    """What experts give for rows that are sorted by expert, times the rows' weights if there are any.

    Rows behind those that `sizes` counts have a number that no expert has; what comes of them means nothing.
    """
    (gate, up, down), biases = kernels[:3], kernels[3:]
    # A product and no look-up, whose gradient would add rows in any order.
    own = jax.nn.one_hot(expert, gate.shape[0], dtype=rows.dtype)
    of_gate, of_up, of_down = (own @ bias for bias in biases) if biases else (0, 0, 0)
    opened, wide = (grouped(rows, kernel, sizes) for kernel in (gate, up))
    opened, wide = opened + of_gate, wide + of_up
    if weights is not None and biases:  # no gradient of biases comes from rows that mean nothing
        counted = (expert < gate.shape[0])[:, None]
        opened, wide = (jnp.where(counted, x, 0) for x in (opened, wide))
    hidden = GATED[activation](opened, wide)
    if weights is not None:  # before the last product, whose result the gradient of the weights then does not need
        hidden = (hidden.astype(jnp.float32) * weights[:, None]).astype(rows.dtype)
        of_down = (of_down * weights[:, None]).astype(rows.dtype) if biases else 0
    return grouped(hidden, down, sizes) + of_down


def _pulled_back(
    activation: str, expert: Array, sizes: Array, rows: Array, weights: Array, cotangent: Array, kernels: Kernels
) -> tuple[Array, Array, Kernels]:
    """The cotangents of rows, weights and kernels."""

    def weighted(rows: Array, weights: Array, kernels: Kernels) -> Array:
        return _fed(activation, expert, sizes, rows, kernels, weights)

    return jax.vjp(weighted, rows, weights, kernels)[1](cotangent)


@cache
def _mapped(activation: str) -> Any:
    """`_sorted` with a rule for maps: `ragged_dot` cannot be mapped over one factor alone."""
    mapped = jax.custom_batching.custom_vmap(partial(_sorted, activation))
    mapped.def_vmap(partial(_map, activation))
    return mapped


def _map(activation: str, size: int, mapped: Any, x: Array, weights: Array, chosen: Array, kernels: Kernels) -> Any:
    if any(mapped[3]):
        raise NotImplementedError("experts are mapped over tokens, not over parameters")
    inputs = [
        v if m else jnp.broadcast_to(v, (size, *v.shape)) for v, m in zip((x, weights, chosen), mapped[:3], strict=True)
    ]
    # Tokens of a mapped axis are only more tokens.
    return _sorted(activation, inputs[0], inputs[1], inputs[2], kernels), True


# What can be mapped by a rule of its own cannot be differentiated, so the gradient is that of what is behind the rule.
_dropless.defvjp(
    lambda activation, *inputs: jax.vjp(partial(_sorted, activation), *inputs),
    lambda activation, pullback, out: pullback(out),
)


def bounded(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T K"],
    chosen: Int[Array, "B T K"],
    real: Bool[Array, "B T"],
    kernels: Kernels,
    slots: int,
    activation: str = "swiglu",
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """The same sum without the assignments that find their expert's `slots` taken, and how many those are.

    All first choices of a row are served before any second choice, each in the order of the tokens (Lepikhin et al.
    2021, algorithm 1); weights of what is left are not raised. Padding takes no slot.
    """
    (gate, up, down), biases = kernels[:3], kernels[3:]
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
    of_gate, of_up, of_down = (bias[None, :, None] for bias in biases) if biases else (0, 0, 0)
    opened, wide = (jnp.einsum("becd,edf->becf", inputs, kernel) for kernel in (gate, up))
    hidden = GATED[activation](opened + of_gate, wide + of_up)
    out = (jnp.einsum("becf,efd->becd", hidden, down) + of_down).reshape(batch, experts * slots, -1)
    out = jax.vmap(combine)(out, slot).reshape(batch, per_token, length, -1).swapaxes(1, 2)
    return _weighted(out, weights), (wanted & ~kept).sum().astype(jnp.float32)


def _weighted(out: Float[Array, "*B K D"], weights: Float[Array, "*B K"]) -> Float[Array, "*B D"]:
    # The sum over experts is float32, like every other sum that is small and cheap.
    return (out.astype(jnp.float32) * weights[..., None]).sum(axis=-2).astype(out.dtype)


class Matrix(nn.Module):
    """A matrix, or one per expert, and its bias: leaves named like those of any other layer."""

    shape: tuple[int, ...]
    std: float
    bias: bool

    @nn.compact
    def __call__(self) -> tuple[Array, ...]:
        kernel = self.param("kernel", nn.initializers.normal(self.std), self.shape)
        if not self.bias:
            return (kernel,)
        return kernel, self.param("bias", nn.initializers.zeros, (*self.shape[:-2], self.shape[-1]))


class Experts(nn.Module):
    """Gated experts behind a softmax router, in the place of the feed-forward block.

    The router's product and softmax are float32 (Fedus et al. 2022, section 2.4). What it did with real tokens is sown
    into the collection `routing` where that is asked for. Recorded `routes` are taken in the place of its choice,
    unless the collection `rerouted` is asked for: then it chooses, and says there which tokens go elsewhere. What it
    chose itself is in the collection `chosen`.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], routes: Int[Array, "B T K"] | None = None
    ) -> Float[Array, "B T D"]:
        c = self.config
        router = Matrix((c.width, c.experts), c.init_std, c.biases, name="router")()
        logits = x.astype(jnp.float32) @ router[0]
        logits = logits + router[1][None, None] if c.biases else logits
        weights, chosen = route(logits, c.experts_per_token, c.norm_topk)
        self.sow("chosen", "of", chosen)
        if routes is not None and self.is_mutable_collection("rerouted"):
            self.sow("rerouted", "of", rerouted(chosen, routes))
        elif routes is not None:
            weights, chosen = replayed(jax.nn.softmax(logits, axis=-1), chosen, routes, c.norm_topk)
        inner, outer = (c.experts, c.width, c.mlp_width), (c.experts, c.mlp_width, c.width)
        matrices = [Matrix(inner, c.init_std, c.biases, name=name)() for name in ("gate", "up")]
        matrices.append(Matrix(outer, c.init_std / (2 * c.layers) ** 0.5, c.biases, name="down")())
        kernels = tuple(leaf.astype(c.compute_dtype) for leaves in zip(*matrices, strict=True) for leaf in leaves)
        if c.capacity_factor is None:
            out, dropped = dropless(x, weights, chosen, kernels, c.activation), jnp.float32(0.0)
        else:
            slots = capacity(c.capacity_factor, x.shape[1], c.experts, c.experts_per_token)
            out, dropped = bounded(x, weights, chosen, real, kernels, slots, c.activation)
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
