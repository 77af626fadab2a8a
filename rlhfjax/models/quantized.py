"""Parameters of a policy in int8, for sampling: half the bytes of bfloat16, and bytes are what decoding waits for.

A quantised matrix is int8 and has a float32 scale for each output (each row of an embedding) beside it, under its own
name and `_scale`: W ≈ q · s with s = max|W| / 127 over the inputs, so that no element is off by more than s / 2. A
product reads the integers and multiplies its sums by the scales (Dettmers et al. 2022, section 2, "row-wise", without
their outliers; the inputs stay as they are). Norms, biases, adapters, routers, experts and heads stay, too.

A cache of keys and values may be int8, too, with a scale for each of its vectors; attention reads the integers.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from rlhfjax.target import current
from rlhfjax.types import Params

SCALE = "_scale"
_WHOLE = re.compile(r"(^|/)(positions|experts|head|mtp_heads)(/|$)")


def quantize_array(x: Float[Array, "*A"], axes: int | tuple[int, ...]) -> tuple[Int8[Array, "*A"], Float[Array, "*S"]]:
    """(q, s) with q = round(x / s) in -127 … 127 and s = max|x| / 127 over `axes`, which s keeps with size 1.

    |x - q · s| <= s / 2. It is symmetric: 0 stays 0, and a product needs no correction for an offset. Where all of x
    is 0, s is 1.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127.0, 1.0)
    return jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8), scale


def quantize(params: Params) -> Params:
    """The same model with int8 embeddings and linears; other arrays are shared. Layers are stacked below `blocks`."""
    return _quantized(params, "")


def _quantized(params: Params, path: str) -> Params:
    made = {}
    for name, tree in params.items():
        here = f"{path}/{name}"
        if isinstance(tree, dict):
            made[name] = tree if _WHOLE.search(here) else _quantized(tree, here)
        elif name in ("kernel", "embedding"):
            made[name], made[name + SCALE] = quantize_array(tree, _inputs(here))
        else:
            made[name] = tree
    return made


def _inputs(path: str) -> int | tuple[int, ...]:
    """The axes of a kernel that a product adds over, those of an embedding that belong to one row."""
    parts = path.split("/")
    if parts[-1] == "embedding":
        return 1
    lead = int("blocks" in parts)  # the layer
    # The output of attention reads heads x head_dim.
    return tuple(range(lead, lead + (2 if parts[-2] == "out" else 1)))


def is_quantized(params: Params) -> bool:
    """Whether any array is int8."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params))


def dequantize(params: Params) -> Params:
    """What a quantised tree stands for, float32."""
    whole = {}
    for name, tree in params.items():
        if isinstance(tree, dict):
            whole[name] = dequantize(tree)
        elif name + SCALE in params:
            whole[name] = tree.astype(jnp.float32) * params[name + SCALE]
        elif not (name.endswith(SCALE) and name[: -len(SCALE)] in params):
            whole[name] = tree
    return whole


def int8_dot(
    x: Float[Array, "*B"], kernel: Int8[Array, "*W"], scale: Float[Array, "*S"], inputs: int, dtype: Any
) -> Float[Array, "*C"]:
    """x · (q s) = (x · q) s over the last `inputs` axes of x and the first of q; the sum is float32.

    What TPUs give of such a sum has the type of the computation, as without integers: several add up their parts of it,
    and float32 would be twice the bytes.
    """
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    kind = dtype if current().platform == "tpu" else jnp.float32
    out = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (axes, ((), ())), preferred_element_type=kind)
    outputs = scale.shape[inputs:]
    return (out.astype(jnp.float32) * scale.reshape((1,) * (out.ndim - len(outputs)) + outputs)).astype(dtype)


class Int8Vectors(NamedTuple):
    """Vectors along the last axis when they are new; a cache may hold them with other axes in another order."""

    integers: Array
    scales: Array  # of size 1 along the vectors


def vectors(x: Float[Array, "*B D"], int8: bool) -> Array | Int8Vectors:
    """What a cache keeps of new keys or values: themselves, or int8 with a scale each."""
    return Int8Vectors(*quantize_array(x, -1)) if int8 else x


def empty_vectors(shape: tuple[int, ...], axis: int, dtype: Any, int8: bool) -> Array | Int8Vectors:
    """Zeros for a cache whose vectors lie along `axis`."""
    if not int8:
        return jnp.zeros(shape, dtype)
    return Int8Vectors(jnp.zeros(shape, jnp.int8), jnp.ones((*shape[:axis], 1, *shape[axis + 1 :]), jnp.float32))


def read_vectors(kept: Array | Int8Vectors, dtype: Any) -> tuple[Array, Array | None]:
    """The numbers for a product, and the scales for what comes out of it; None: there are none."""
    return (kept.integers.astype(dtype), kept.scales) if isinstance(kept, Int8Vectors) else (kept, None)


def plain_vectors(kept: Array | Int8Vectors, dtype: Any) -> Array:
    """What the kept vectors stand for."""
    numbers, scales = read_vectors(kept, jnp.float32 if isinstance(kept, Int8Vectors) else dtype)
    return numbers if scales is None else (numbers * scales).astype(dtype)
