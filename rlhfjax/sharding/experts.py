"""Experts on a mesh: every device computes its own, for tokens that come to it over the axis `expert` and go back.

Nothing is dropped. What is computed at once has room for `SPARE` times the even share of the assignments; where routers
are less even than that, there is another pass for what is over. So arrays have one size whatever is chosen: for each
token of a device some SPARE x K rows, of D numbers and of the width inside an expert.

There are two ways to travel, for N tokens a device, each with K experts. While the axis has at most K devices, each
gets all tokens of its neighbours, and its sums over its own experts are added up where the tokens came from: N (e - 1)
rows each way. On a longer axis that would be more than the assignments themselves, so these are sent: N K SPARE.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.sharding.rules import MESH_AXES, dividing

SPARE = 1.25
AXIS = MESH_AXES["expert"]
Program = Callable[..., Any]


@dataclass(frozen=True)
class Split:
    """How tokens, experts and their matrices lie on a mesh; axes that do not divide a size are left out."""

    mesh: Mesh
    rows: tuple[str, ...]
    tokens: str | None
    inputs: str | None  # of the matrices' gradients
    width: str | None
    experts: int  # of a device
    exchanged: bool  # assignments travel, and not tokens

    @property
    def apart(self) -> tuple[str, ...]:
        """The axes along which devices have other tokens."""
        return (*self.rows, self.tokens) if self.tokens else self.rows

    @property
    def gathered(self) -> bool:
        return AXIS in self.rows and self.mesh.shape[AXIS] > 1 and not self.exchanged

    def spec(self) -> PartitionSpec:
        """Of arrays [B, T, …]."""
        return PartitionSpec(self.rows or None, self.tokens, None)

    def kernels(self, count: int, inputs: str | None = None) -> tuple[PartitionSpec, ...]:
        """Of gate, up and down, and their biases if there are any; inputs are whole where they are computed with."""
        columns = PartitionSpec(AXIS, self.width)
        of_biases = (columns, columns, PartitionSpec(AXIS, inputs))
        wide = PartitionSpec(AXIS, inputs, self.width)
        return (wide, wide, PartitionSpec(AXIS, self.width, inputs), *of_biases)[:count]

    def gather(self, x: Array) -> Array:
        return jax.lax.all_gather(x, AXIS, tiled=True) if self.gathered else x

    def send(self, x: Array) -> Array:
        """Part i of the first axis goes to device i; what came from device i is part i."""
        return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True) if self.exchanged else x

    def returned(self, x: Array) -> Array:
        """Sums over the experts of all devices, where the tokens came from."""
        if self.gathered:
            x = jax.lax.psum_scatter(x, AXIS, tiled=True)
        elif not self.exchanged and self.mesh.shape[AXIS] > 1:
            x = jax.lax.psum(x, AXIS)
        return jax.lax.psum(x, self.width) if self.width else x

    def summed(self, gradient: Array, inputs: int | None) -> Array:
        """The gradient of a matrix over all tokens; each device keeps its part of the axis `inputs`."""
        others = tuple(axis for axis in self.apart if axis not in (AXIS, self.inputs if inputs is not None else None))
        gradient = jax.lax.psum(gradient, others) if others else gradient
        if inputs is None or not self.inputs:
            return gradient
        if self.inputs in self.rows:
            return jax.lax.psum_scatter(gradient, self.inputs, scatter_dimension=inputs, tiled=True)
        size = gradient.shape[inputs] // self.mesh.shape[self.inputs]
        return jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(self.inputs) * size, size, inputs)


def split_of(mesh: Mesh, x: Array, chosen: Array, kernels: tuple[Array, ...]) -> Split:
    """For tokens [B, T, D] with K experts each."""
    devices, rows = mesh.shape[AXIS], dividing(mesh, MESH_AXES["batch"], x.shape[0])
    named = tuple(axis for axis in rows or () if mesh.shape[axis] > 1)

    def only(axis: str, size: int) -> str | None:
        return axis if mesh.shape[axis] > 1 and dividing(mesh, axis, size) else None

    return Split(
        mesh,
        named,
        only(MESH_AXES["token"], x.shape[1]),
        only(MESH_AXES["embed"], x.shape[2]),
        only(MESH_AXES["mlp"], kernels[0].shape[-1]),
        kernels[0].shape[0] // devices,
        AXIS in named and devices > chosen.shape[-1],
    )


@dataclass(frozen=True)
class Windows:
    """Assignments in the order of their experts, cut into windows of `size` for each device that some may go to.

    `key` numbers the expert of an assignment through all of these devices; what is computed elsewhere is beyond them.
    """

    split: Split
    key: Int[Array, "N K"]
    order: Int[Array, "A"]
    rank: Int[Array, "A"]  # of an assignment in this order
    start: Int[Array, "J"]
    count: Int[Array, "J"]
    size: int

    def passes(self) -> Array:
        """How many windows the fullest device needs; the same everywhere if there is something to wait for in them."""
        needed = -(-self.count.max() // self.size)
        return jax.lax.pmax(needed, self.split.mesh.axis_names) if self.split.exchanged else needed

    def assignments(self, number: Array) -> tuple[Int[Array, "R"], Int[Array, "R"], Bool[Array, "R"]]:
        """The assignments in the windows of this number, R = J x size; their experts, as their devices count them; and
        which of these places hold any. Where there is none, the expert is one more than there are.
        """
        place = number * self.size + jnp.arange(self.size, dtype=jnp.int32)[None, :]
        real = (place < self.count[:, None]).reshape(-1)
        at = jnp.minimum(self.start[:, None] + place, len(self.order) - 1).reshape(-1)
        chosen = self.order.at[at].get(mode="promise_in_bounds")
        keys = self.key.reshape(-1).at[chosen].get(mode="promise_in_bounds")
        return chosen, jnp.where(real, keys % self.split.experts, self.split.experts), real

    def places(self, number: Array) -> Int[Array, "N K"]:
        """Where the windows of this number hold each assignment; beyond their end, where they do not."""
        device = self.key // self.split.experts
        known = jnp.minimum(device, len(self.start) - 1)
        within = self.rank.reshape(self.key.shape) - self.start[known] - number * self.size
        held = (device < len(self.start)) & (within >= 0) & (within < self.size)
        return jnp.where(held, known * self.size + within, len(self.start) * self.size)


def windows_of(split: Split, chosen: Int[Array, "N K"]) -> Windows:
    """For tokens that a device has, its own or its neighbours' as well."""
    experts, devices = split.experts, split.mesh.shape[AXIS]
    per_token = chosen.shape[1]
    if split.exchanged:
        key, targets, most, even = chosen, devices, chosen.size, chosen.size / devices
    else:
        here = chosen - jax.lax.axis_index(AXIS) * experts
        key = jnp.where((here >= 0) & (here < experts), here, experts)
        targets, most, even = 1, len(chosen) * min(per_token, experts), chosen.size / devices
    flat = key.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.arange(targets + 1, dtype=jnp.int32) * experts
    below = (flat[None, :] < bounds[:, None]).sum(axis=1, dtype=jnp.int32)
    size = min(most, 8 * math.ceil(SPARE * even / 8))
    return Windows(split, key, order, _ranks(flat, targets * experts), below[:-1], jnp.diff(below), size)


def _ranks(keys: Int[Array, "A"], most: int) -> Int[Array, "A"]:
    """Where a stable sort puts each of these keys from 0 to `most`. TPUs count faster than they sort once more."""
    is_key = (keys[None, :] == jnp.arange(most + 1, dtype=jnp.int32)[:, None]).astype(jnp.int32)
    counts = is_key.sum(axis=1)
    within = jnp.cumsum(is_key, axis=1) - 1
    return ((within + (jnp.cumsum(counts) - counts)[:, None]) * is_key).sum(axis=0)


def _in_passes(windows: Windows, step: Callable[[Array, Any], Any], start: Any) -> Any:
    """`step` for each number of a window, from `start`; without a loop where one window always does."""
    split = windows.split
    most = windows.key.size if split.exchanged else len(windows.key) * min(windows.key.shape[1], split.experts)
    if windows.size >= most:
        return step(jnp.int32(0), start)
    passes = windows.passes()
    made = jax.lax.while_loop(lambda c: c[0] < passes, lambda c: (c[0] + 1, step(*c)), (jnp.int32(0), start))
    return made[1]


def _at_experts(split: Split, experts: Int[Array, "R"], compute: Program, *arrays: Array) -> tuple[Array, ...]:
    """`compute` of arrays by assignment where their experts are, sorted by these; what it gives for each comes back.

    It gives (arrays by assignment, anything else).
    """
    arrays, back = tuple(map(split.send, (experts, *arrays))), None
    if split.exchanged:
        order, back = jnp.argsort(arrays[0], stable=True), _ranks(arrays[0], split.experts)
        arrays = tuple(x.at[order].get(unique_indices=True, mode="promise_in_bounds") for x in arrays)
    numbers = jnp.arange(split.experts, dtype=jnp.int32)[:, None]
    sizes = (arrays[0][None, :] == numbers).sum(axis=1, dtype=jnp.int32)
    made, rest = compute(arrays[0], sizes, *arrays[1:])
    if back is not None:
        made = tuple(split.send(x.at[back].get(unique_indices=True, mode="promise_in_bounds")) for x in made)
    return *made, rest


def _added(total: Float[Array, "N D"], rows: Float[Array, "R D"], places: Array, weights: Array | None) -> Array:
    """total + Σ_k weight_k · rows[place_k] in float32; by look-ups, and in the order of k on every platform."""

    def add(total: Array, of: tuple[Array, Any]) -> tuple[Array, None]:
        one = rows.at[of[0]].get(mode="fill", fill_value=0).astype(jnp.float32)
        return total + (one if of[1] is None else one * of[1][:, None]), None

    return jax.lax.scan(add, total, (places.T, None if weights is None else weights.T))[0]


def by_experts(mesh: Mesh, forward: Program, backward: Program) -> Program:
    """f(x [B, T, D], weights [B, T, K], chosen [B, T, K], kernels) = Σ_k weight_k · expert_k(x), and its gradient.

    `forward` (experts, sizes, rows, kernels) gives rows that are sorted by expert, as many of each as `sizes` says;
    `backward` (experts, sizes, rows, weights, cotangents, kernels) the cotangents of rows, of weights and of kernels,
    where rows are multiplied by their weights.
    """

    def computed(x: Array, weights: Array, chosen: Array, kernels: tuple[Array, ...]) -> Array:
        split = split_of(mesh, x, chosen, kernels)

        def device(x: Array, weights: Array, chosen: Array, *kernels: Array) -> Array:
            return _forward(split, forward, x, weights, chosen, _biased_once(split, kernels))

        spec = split.spec()
        specs = (spec, spec, spec, *split.kernels(len(kernels)))
        return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(
            x, weights, chosen, *kernels
        )

    def pulled_back(inputs: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
        x, weights, chosen, kernels = inputs
        split, count = split_of(mesh, x, chosen, kernels), len(kernels)

        def device(x: Array, weights: Array, chosen: Array, cotangent: Array, *kernels: Array) -> tuple[Array, ...]:
            return _backward(split, backward, (x, weights, chosen, cotangent), _biased_once(split, kernels))

        spec = split.spec()
        specs = (spec, spec, spec, spec, *split.kernels(count))
        outs = (spec, spec, *split.kernels(count, split.inputs))
        spread = jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False)
        of_x, of_weights, *of_kernels = spread(x, weights, chosen, cotangent, *kernels)
        return of_x, of_weights, None, tuple(of_kernels)

    program = jax.custom_vjp(computed)
    program.defvjp(lambda *inputs: (computed(*inputs), inputs), pulled_back)
    return program


def _biased_once(split: Split, kernels: tuple[Array, ...]) -> tuple[Array, ...]:
    """Kernels of which one device along the split width adds the last bias; what they give is added up."""
    if len(kernels) == 3 or not split.width:
        return kernels
    first = (jax.lax.axis_index(split.width) == 0).astype(kernels[-1].dtype)
    return *kernels[:-1], kernels[-1] * first


def _flat(split: Split, *arrays: Array) -> list[Array]:
    return [split.gather(x.reshape(-1, x.shape[-1])) for x in arrays]


def _forward(split: Split, forward: Program, x: Array, weights: Array, chosen: Array, kernels: Any) -> Array:
    shape, dtype = x.shape, x.dtype
    x, weights, chosen = _flat(split, x, weights, chosen)
    windows = windows_of(split, chosen)

    def step(number: Array, total: Array) -> Array:
        at, experts, _ = windows.assignments(number)
        rows = x.at[at // chosen.shape[1]].get(mode="promise_in_bounds")

        def compute(experts: Array, sizes: Array, rows: Array) -> tuple[tuple[Array], None]:
            return (forward(experts, sizes, rows, kernels),), None

        made, _ = _at_experts(split, experts, compute, rows)
        return _added(total, made, windows.places(number), weights)

    total = _in_passes(windows, step, jnp.zeros(x.shape, jnp.float32))
    return split.returned(total.astype(dtype)).reshape(shape)


def _backward(split: Split, backward: Program, inputs: tuple[Array, ...], kernels: Any) -> tuple[Array, ...]:
    shapes, dtypes = [x.shape for x in inputs[:2]], [x.dtype for x in inputs[:2]]
    x, weights, chosen, cotangent = _flat(split, *inputs)
    windows = windows_of(split, chosen)

    def step(number: Array, totals: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Array, Array, tuple[Array, ...]]:
        at, experts, real = windows.assignments(number)
        rows, out = (v.at[at // chosen.shape[1]].get(mode="promise_in_bounds") for v in (x, cotangent))
        factors = weights.reshape(-1).at[at].get(mode="promise_in_bounds")

        def compute(experts: Array, sizes: Array, *arrays: Array) -> tuple[tuple[Array, Array], Any]:
            of_rows, of_factors, of_kernels = backward(experts, sizes, *arrays, kernels)
            return (of_rows, of_factors), of_kernels

        of_rows, of_factors, of_kernels = _at_experts(split, experts, compute, rows, factors, out)
        own = jnp.where(
            real, at, weights.size + jnp.arange(len(at), dtype=jnp.int32)
        )  # each another, and the rest beyond
        return (
            _added(totals[0], of_rows, windows.places(number), None),
            totals[1].at[own].set(of_factors, unique_indices=True, mode="drop"),
            jax.tree.map(jnp.add, totals[2], of_kernels),
        )

    start = jnp.zeros(x.shape, jnp.float32), jnp.zeros(weights.size, jnp.float32), jax.tree.map(jnp.zeros_like, kernels)
    of_x, of_weights, of_kernels = _in_passes(windows, step, start)
    returned = (
        split.returned(total.astype(dtype)).reshape(shape)
        for total, dtype, shape in zip((of_x, of_weights.reshape(weights.shape)), dtypes, shapes, strict=True)
    )
    axes = (1, 1, 2, None, None, 1)
    summed = (split.summed(gradient, axis) for gradient, axis in zip(of_kernels, axes, strict=False))
    return *returned, *summed
