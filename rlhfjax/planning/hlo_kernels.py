"""FLOPs of what a compiled program gives to kernels: grouped products and attention on TPUs, cuBLAS and cuDNN."""

import math
import re
from collections.abc import Callable

from rlhfjax.planning.hlo_text import Instruction

Shape = tuple[int, ...]
_GROUPED = re.compile(r"gmm\)+/pallas_call")
# Products of a block of queries with one of keys, by the name of the kernel; the backward ones find scores again.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 5}
_CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
_FORWARD, _BACKWARD = 2, 5


def products(one: Instruction, shape_of: Callable[[str], Shape | None]) -> float:
    """Of a kernel that multiplies with weights, 0 of others. Rows that there is room for count as if each were one."""
    if _GROUPED.search(one.rest):
        return _grouped(one, shape_of)
    if "__cublas$" in one.rest and (contracted := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)):
        left = shape_of(one.operands[0]) or ()
        inner = [left[int(axis)] for axis in re.findall(r"\d+", contracted[1])]
        return 2.0 * math.prod(one.shapes[0][1]) * math.prod(inner)
    return 0.0


def attention(one: Instruction, shape_of: Callable[[str], Shape | None]) -> float:
    """Of an attention kernel, 0 of others. A causal one does half of the square."""
    if found := re.match(r"splash_\w*?_(fwd|dq|dkv)", one.name):
        queries, keys = shape_of(one.operands[2]) or (), shape_of(one.operands[3]) or ()
        return _SPLASH[found[1]] * math.prod(queries) * keys[-2] if len(queries) > 1 and len(keys) > 1 else 0.0
    if found := _CUDNN.search(one.rest):
        square = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]', one.rest)
        sizes = [int(size) for size in re.findall(r"\d+", square[1])] if square else [0]
        causal = 0.5 if "CAUSAL" in one.rest else 1.0
        return 2 * causal * (_BACKWARD if found[1] else _FORWARD) * math.prod(sizes) * one.shapes[0][1][-1]
    return 0.0


def _grouped(one: Instruction, shape_of: Callable[[str], Shape | None]) -> float:
    """Rows [R, D] times a matrix of their group, to [R, F]; or times rows [R, F], to a matrix of each group."""
    out = one.shapes[0][1]
    rows = [shape for name in one.operands if (shape := shape_of(name)) and len(shape) == 2]
    inner = [size for shape in rows if shape[0] == out[0] for size in shape[1:]] if len(out) == 2 else rows[0][:1]
    return 2.0 * math.prod(out[-2:]) * inner[0]
