"""Low-rank adapters (Hu et al. 2021) as pure functions of parameter trees.

A linear with adapters holds `lora_a` [*in, r] and `lora_b` [r, *out] beside its `kernel` [*in, *out], each behind the
same leading axis of layers, and computes x·W + (α/r)·(x·A)·B. What is trained and what is frozen are two trees
with disjoint leaves; `join` makes them one again without copying an array.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.types import Params

LEAVES = ("lora_a", "lora_b")


def linears(params: Params, prefix: str = "") -> dict[str, Any]:
    """Path and kernel of every matrix that adapters can go beside: 'blocks/attention/query' -> kernel.

    The unembedding and a mixture of experts have no place for adapters; the head of a scalar model is trained itself.
    """
    found = {}
    for name, tree in params.items():
        if not isinstance(tree, dict) or name in ("unembed", "head") or "router" in tree:
            continue
        path = f"{prefix}{name}"
        found |= {path: tree["kernel"]} if "kernel" in tree else linears(tree, f"{path}/")
    return found


def init_lora(key: jax.Array, params: Params, rank: int, targets: Sequence[str]) -> Params:
    """Fresh adapters for the linears whose path holds a match of one of `targets`; joined to `params` they add nothing.

    A ~ U(-1/√n, 1/√n) with n the size of the input (Kaiming's uniform initialisation with a = √5), B = 0; float32.
    Raises ConfigError when a pattern matches no linear.
    """
    chosen = targeted(linears(params), targets)
    adapters: Params = {}
    for (path, kernel), own in zip(chosen.items(), jax.random.split(key, len(chosen)), strict=True):
        lead, inputs, outputs = _axes(path, kernel.shape)
        bound = 1.0 / np.prod(inputs) ** 0.5
        a = jax.random.uniform(own, (*lead, *inputs, rank), jnp.float32, -bound, bound)
        leaves = {"lora_a": a, "lora_b": jnp.zeros((*lead, rank, *outputs), jnp.float32)}
        adapters = join(adapters, _nested(path.split("/"), leaves))
    return adapters


def targeted(named: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """The entries whose name holds a match of one of the patterns, in order; ConfigError for one that matches none."""
    for pattern in targets:
        if not any(re.search(pattern, name) for name in named):
            raise ConfigError(
                f"model.lora.targets: {pattern!r} matches no linear of this model; its linears are {', '.join(named)}"
            )
    return {name: entry for name, entry in named.items() if any(re.search(pattern, name) for pattern in targets)}


def split(params: Params) -> tuple[Params, Params]:
    """(frozen, trained): with adapters, everything else, and they with the scalar head; without, nothing, and all.

    Arrays are shared, not copied.
    """
    return _split(params) if has_adapters(params) else ({}, params)


def _split(params: Params) -> tuple[Params, Params]:
    frozen, trained = {}, {}
    for name, tree in params.items():
        if name in (*LEAVES, "head"):
            trained[name] = tree
        elif not isinstance(tree, dict):
            frozen[name] = tree
        else:
            rest, adapters = _split(tree)
            frozen |= {name: rest} if rest else {}
            trained |= {name: adapters} if adapters else {}
    return frozen, trained


def join(frozen: Params, trained: Params) -> Params:
    """One tree with the leaves of both, which have none in common. `join({}, params)` is `params`."""
    if not frozen or not trained:
        return frozen or trained
    both = {name: join(frozen[name], trained[name]) for name in frozen.keys() & trained.keys()}
    return dict(frozen) | dict(trained) | both


def has_adapters(params: Params) -> bool:
    """Whether any linear holds adapters."""
    return any(name in LEAVES or (isinstance(tree, dict) and has_adapters(tree)) for name, tree in params.items())


def merge(params: Params, alpha: float) -> Params:
    """The same model without adapters: W + (α/r)·A·B in the kernel's type (Hu et al. 2021, section 4.1)."""
    if "lora_a" in params:
        a, b, kernel = params["lora_a"], params["lora_b"], params["kernel"]
        lead = a.ndim + b.ndim - kernel.ndim - 2
        rank, shape = a.shape[-1], kernel.shape[:lead]
        update = jnp.matmul(a.reshape(*shape, -1, rank), b.reshape(*shape, rank, -1), precision="highest")
        merged = kernel.astype(jnp.float32) + alpha / rank * update.reshape(kernel.shape)
        rest = {name: leaf for name, leaf in params.items() if name not in LEAVES}
        return rest | {"kernel": merged.astype(kernel.dtype)}
    return {name: merge(tree, alpha) if isinstance(tree, dict) else tree for name, tree in params.items()}


def _axes(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A kernel's leading (layer), input and output axes. Attention's output reads heads x head_dim."""
    parts = path.split("/")
    lead = int("blocks" in parts)
    inputs = lead + (2 if parts[-1] == "out" else 1)
    return shape[:lead], shape[lead:inputs], shape[inputs:]


def _nested(path: Sequence[str], leaves: Params) -> Params:
    return {path[0]: _nested(path[1:], leaves)} if path else leaves
