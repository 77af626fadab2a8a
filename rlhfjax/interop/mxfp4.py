"""Matrices in MXFP4, as the experts of gpt-oss are published: four bits per number, and a scale for 32 of them.

A number is E2M1, a scale a power of two, both of the OCP Microscaling formats (Rouhani et al. 2023, table 1). A matrix
[in, outputs] of each expert is two tensors, `NAME_blocks` [experts, outputs, in / 32, 16], the first of two numbers in
the lower bits of an octet, and `NAME_scales` [experts, outputs, in / 32].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from rlhfjax.errors import IntegrityError
from rlhfjax.interop.safetensors_files import Tensor, read_octets
from rlhfjax.leaves import Region

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([sign * number for sign in (1, -1) for number in _MAGNITUDES], np.float32)
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", 127


@dataclass(frozen=True)
class Packed(Tensor):
    """Where the two tensors of a matrix are; type and shape are those of what they stand for."""

    blocks: Tensor
    scales: Tensor


def dequantize(blocks: UInt8[np.ndarray, "E O B 16"], scales: UInt8[np.ndarray, "E O B"]) -> Float[np.ndarray, "E I O"]:
    """number · 2^(scale - 127), float32, with the inputs before the outputs."""
    made = np.empty((*blocks.shape[:-1], 32), np.float32)
    made[..., 0::2], made[..., 1::2] = _NUMBERS[blocks & 15], _NUMBERS[blocks >> 4]
    with np.errstate(over="ignore"):
        made = np.ldexp(made, scales.astype(np.int32)[..., None] - _BIAS)
    return made.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)


def with_matrices(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, pairs in MXFP4 as one by their matrix's name. Raises IntegrityError where two do not fit."""
    made = dict(found)
    for name, blocks in found.items():
        if not name.endswith(_BLOCKS):
            continue
        own, scales = name.removesuffix(_BLOCKS), made.pop(name.removesuffix(_BLOCKS) + _SCALES, None)
        right = len(blocks.shape) == 4 and blocks.shape[-1] == 16 and blocks.dtype == "U8"
        if scales is None or scales.dtype != "U8" or not right or scales.shape != blocks.shape[:-1]:
            raise IntegrityError(
                f"{blocks.path}: expected MXFP4 blocks [experts, outputs, inputs / 32, 16] of octets with scales, got "
                f"{name[:80]!r} of {blocks.dtype} {list(blocks.shape)}; fetch the files again"
            )
        del made[name]
        experts, outputs, count, _ = blocks.shape
        shape = experts, 32 * count, outputs
        made[own] = Packed(blocks.path, "F32", shape, blocks.start, blocks.end, blocks, scales)
    return made


def read_block(tensor: Packed, name: str, block: Region) -> Float[np.ndarray, "E I O"]:
    """A block [experts, inputs, outputs] of a matrix, an expert at a time. Raises IntegrityError as `read_tensor`."""
    experts, inputs, outputs = block
    first, last = inputs.start // 32, -(-inputs.stop // 32)
    here = slice(inputs.start - 32 * first, inputs.stop - 32 * first, inputs.step)
    shape = [len(range(*part.indices(size))) for part, size in zip(block, tensor.shape, strict=True)]
    made = np.empty((shape[0], shape[2], shape[1]), np.float32).swapaxes(1, 2)  # which lies as what is read does
    for i, expert in enumerate(range(*experts.indices(tensor.shape[0]))):
        blocks, scales = (
            read_octets(part, name, expert, outputs)[None, :: outputs.step or 1, first:last]
            for part in (tensor.blocks, tensor.scales)
        )
        made[i : i + 1] = read = dequantize(blocks, scales)[:, here]
        if not np.isfinite(read).all():
            raise IntegrityError(f"{tensor.path}: expected finite numbers in tensor {name!r}, got a scale of infinity")
    return made
