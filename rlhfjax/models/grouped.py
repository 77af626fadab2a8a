"""Products of rows with the matrix of their group, for rows that are sorted by it.

TPUs have a kernel of jax's own for them (MegaBlox: Gale et al. 2022), which skips the tiles of rows behind the last
group. What XLA makes of `ragged_dot` there depends on libtpu: that of early 2026 multiplies every row with every matrix
for the gradient of the matrices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.target import current

_LANES, _SUBLANES = 128, 16  # of a TPU's registers, for bfloat16
_MOST_ROWS = 512  # of a tile


def grouped(rows: Float[Array, "R D"], kernels: Float[Array, "E D F"], sizes: Int[Array, "E"]) -> Float[Array, "R F"]:
    """The first sizes[0] rows times kernels[0], the next sizes[1] times kernels[1] …; what is behind means nothing."""
    if current().platform == "tpu":
        return _on_tpu(False, rows, kernels, sizes)
    return jax.lax.ragged_dot(rows, kernels, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_tpu(interpret: bool, rows: Array, kernels: Array, sizes: Array) -> Array:
    return _product(interpret, rows, kernels, sizes, transposed=False)


def _product(interpret: bool, rows: Array, kernels: Array, sizes: Array, transposed: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    inner, outer = kernels.shape[:0:-1] if transposed else kernels.shape[1:]
    padded = _padded(rows)
    tiling = _row_tile(padded), _tile(inner, 1024), _tile(outer, 1024)
    how = {"tiling": tiling, "transpose_rhs": transposed, "interpret": interpret}
    return gmm(padded, kernels, sizes, rows.dtype, **how)[: len(rows)]


def _backward(interpret: bool, inputs: tuple[Array, ...], cotangent: Array) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, kernels, sizes = inputs
    of_rows = _product(interpret, cotangent, kernels, sizes, transposed=True)
    rows, cotangent = _padded(rows), _padded(cotangent)
    tiling = _row_tile(rows), _tile(rows.shape[1], 1024), _tile(cotangent.shape[1], 1024)
    how = {"tiling": tiling, "interpret": interpret}
    return of_rows, tgmm(rows.swapaxes(0, 1), cotangent, sizes, kernels.dtype, **how), None


_on_tpu.defvjp(lambda interpret, *inputs: (_on_tpu(interpret, *inputs), inputs), _backward)


def _padded(rows: Array) -> Array:
    whole = _LANES if len(rows) > _MOST_ROWS else _SUBLANES
    return jnp.pad(rows, ((0, -len(rows) % whole), (0, 0)))


def _row_tile(rows: Array) -> int:
    return _tile(len(rows), _MOST_ROWS) if len(rows) > _MOST_ROWS else len(rows)


def _tile(size: int, most: int) -> int:
    """The longest tile that cuts a size into equal ones of whole lanes; of others, the longest."""
    fitting = [tile for tile in range(_LANES, most + 1, _LANES) if size % tile == 0]
    return fitting[-1] if fitting else min(size, most)
