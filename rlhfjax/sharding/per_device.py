"""Attention on a mesh: every device runs the program on its own rows and heads, of all tokens.

Where the axis `sequence` splits the tokens, its devices exchange them for heads before the program, and back after it
(DeepSpeed-Ulysses: Jacobs et al. 2023, section 3): whatever the segments, the causal mask and the window, each does as
much as the others. A ring would move no fewer bytes for heads grouped as Llama's, and causal masks would leave half of
its devices waiting.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rlhfjax.sharding.rules import MESH_AXES, dividing

Attention = Callable[..., Array]


def by_rows_and_heads(mesh: Mesh, program: Attention) -> Attention:
    """f(query, key, value, segments, …) of arrays [B, T, heads, D], then [B, T] and scalars, where each device computes
    its part of B and of the heads, once.

    Rows that the mesh does not divide stay whole, and so do tokens. Heads of keys and values are repeated where there
    are too few for every device, and heads are padded where the mesh does not divide those of queries. Where `sequence`
    does not divide the heads that a device has, those that share heads compute queries of their own (`slots` of the
    program).
    """

    def attention(query: Array, key: Array, value: Array, *others: Array) -> Array:
        rows, heads, count = dividing(mesh, MESH_AXES["batch"], query.shape[0]), MESH_AXES["heads"], query.shape[2]
        query, key, value = for_each_device(mesh.shape[heads], query, key, value)
        tokens = dividing(mesh, MESH_AXES["token"], query.shape[1])
        inner = program
        if isinstance(tokens, str) and mesh.shape[tokens] > 1:
            inner = partial(_exchanged, program, tokens, mesh.shape[tokens])
        split = PartitionSpec(rows, tokens, heads, None)
        whole = (PartitionSpec(*(rows, None)[: x.ndim]) for x in others)
        # Pallas does not say over which axes what a kernel returns varies, so it can't be checked.
        spread = jax.shard_map(
            inner, mesh=mesh, in_specs=(split, split, split, *whole), out_specs=split, check_vma=False
        )
        return spread(query, key, value, *others)[:, :, :count]

    return attention


def for_each_device(devices: int, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values [B, T, heads, D] with heads that so many devices divide, each with those that it needs.

    Keys and values lie whole on the devices that share their heads, so that they are repeated where they lie. Heads
    that are padding see nothing but zeros, and are cut off from what attention gives.
    """
    heads, kinds = query.shape[2], key.shape[2]
    if kinds % devices == 0:
        return query, key, value
    key, value = (repeated(x, heads if heads % devices else math.lcm(kinds, devices)) for x in (key, value))
    if heads % devices:
        padded = partial(jnp.pad, pad_width=[(0, 0), (0, 0), (0, -heads % devices), (0, 0)])
        query, key, value = padded(query), padded(key), padded(value)
    return query, key, value


def _exchanged(
    program: Attention,
    axis: str,
    shards: int,
    query: Float[Array, "B t H D"],
    key: Float[Array, "B t K D"],
    value: Float[Array, "B t K D"],
    *others: Array,
) -> Float[Array, "B t H D"]:
    """`program` of all tokens and some heads, for devices that have all heads of some tokens.

    As many devices as divide the heads exchange them, every `rest`th of the axis, and the `rest` next to each other
    gather keys and values alone. So queries of one device lie all over the row, and causal masks give each as much.
    """
    exchanging = math.gcd(shards, query.shape[2])
    rest = shards // exchanging
    apart = [[first + rest * i for i in range(exchanging)] for first in range(rest)] if rest > 1 else None
    both = jnp.concatenate([key, value], axis=-1)
    both = repeated(both, math.lcm(key.shape[2], exchanging))
    exchange = partial(jax.lax.all_to_all, axis_name=axis, axis_index_groups=apart, tiled=True)
    to_heads = partial(exchange, split_axis=2, concat_axis=1)
    if rest > 1:
        near = [[rest * i + first for first in range(rest)] for i in range(exchanging)]
        both = jax.lax.all_gather(both, axis, axis_index_groups=near, axis=1, tiled=True)
    program = program if rest == 1 else partial(program, slots=_places(query.shape[1], axis, exchanging, rest))
    key, value = jnp.split(to_heads(both), 2, axis=-1)
    return exchange(program(to_heads(query), key, value, *others), split_axis=1, concat_axis=2)


def _places(tokens: int, axis: str, exchanging: int, rest: int) -> Int[Array, "N"]:
    """Where the queries that a device gets are in the row: the tokens of every `rest`th device."""
    device = jax.lax.axis_index(axis) % rest + rest * jnp.arange(exchanging, dtype=jnp.int32)
    return (device[:, None] * tokens + jnp.arange(tokens, dtype=jnp.int32)[None, :]).reshape(-1)


def by_heads(mesh: Mesh, program: Attention) -> Attention:
    """The same for a program that XLA can split, where all devices get heads; what divides as it is it splits."""
    axes = (MESH_AXES["heads"], MESH_AXES["token"])
    shards = math.prod(mesh.shape[axis] for axis in axes)

    def attention(query: Array, key: Array, value: Array, *others: Array) -> Array:
        tokens = dividing(mesh, axes[1], query.shape[1])
        as_is = mesh.shape[axes[1]] == 1 and key.shape[2] % shards == 0
        if as_is or tokens is None or query.shape[2] % shards:
            return program(query, key, value, *others)
        rows = dividing(mesh, MESH_AXES["batch"], query.shape[0])
        whole, split = partial(_laid, mesh, (rows, None)), partial(_laid, mesh, (rows, None, axes))

        def spread(x: Array) -> Array:
            """Keys or values: gathered before they are repeated, or XLA would send each copy."""
            gathered = _laid(mesh, (rows, None, dividing(mesh, axes[0], x.shape[2])), x)
            return split(repeated(gathered, math.lcm(x.shape[2], shards)))

        out = program(split(query), spread(key), spread(value), *(whole(x) if x.ndim else x for x in others))
        return _laid(mesh, (rows, tokens, axes[0]), split(out))

    return attention


def _laid(mesh: Mesh, axes: tuple[Any, ...], x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def repeated(x: Float[Array, "B T K D"], heads: int) -> Float[Array, "B T heads D"]:
    """Each of the heads of keys or values as often as it takes to have so many."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
