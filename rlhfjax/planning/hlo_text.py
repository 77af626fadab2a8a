"""Lines of the text of a compiled program: instructions, their shapes and attributes."""

import math
import re
from dataclasses import dataclass
from itertools import accumulate

_WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+(?:e\d+m\d+\w*)?|c\d+)\[([\d,]*)\](\{[^}]*\})?")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Instruction:
    """One line: `shapes` are the arrays of its result, `rest` what follows the name of the operation.

    `near` says of each array whether it lies in a core's own memory (`S(1)`), not in that of the device.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str
    root: bool
    near: tuple[bool, ...] = ()


class Window:
    """The `window={…}` of a convolution."""

    def __init__(self, rest: str):
        found = re.search(r"window=\{([^}]*)\}", rest)
        self._parts = dict(part.split("=", 1) for part in found[1].split()) if found else {}

    def of(self, name: str, axis: int, default: str) -> str:
        return self._parts[name].split("x")[axis] if name in self._parts else default

    def groups(self, name: str, rest: str) -> int:
        found = re.search(rf"{name}=(\d+)", rest)
        return int(found[1]) if found else 1


def places(size: int, kernel: int, out: int, window: Window, axis: int) -> int:
    """Pairs of a place of the kernel and one of the result that meet an element of the input."""
    stride, low = int(window.of("stride", axis, "1")), int(window.of("pad", axis, "0_0").split("_")[0])
    spread, apart = int(window.of("lhs_dilate", axis, "1")), int(window.of("rhs_dilate", axis, "1"))
    most, count = (size - 1) * spread, 0
    for k in range(kernel):
        for o in range(out) if kernel > 1 else (0,):
            place = o * stride - low + k * apart
            count += 0 <= place <= most and place % spread == 0
    return count if kernel > 1 else out


def instruction(found: re.Match) -> Instruction:
    text = found[3]
    if text.startswith("("):  # a tuple's shape
        depths = accumulate((char == "(") - (char == ")") for char in text)
        end = next(place for place, depth in enumerate(depths) if not depth)
        shape, rest = text[: end + 1], text[end + 2 :]
    else:
        shape, _, rest = text.partition(" ")
    opcode = re.match(r"[\w\-]*", rest)[0]  # pyright: ignore[reportOptionalSubscript]
    inside = rest[len(opcode) + 1 :].partition(")")[0]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    found_arrays = _ARRAY.findall(shape)
    arrays = tuple((kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes, _ in found_arrays)
    near = tuple("S(1)" in layout for _, _, layout in found_arrays)
    return Instruction(found[2], opcode, arrays, operands, rest, bool(found[1]), near)


def attribute(rest: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def bytes_of(shapes: tuple) -> float:
    total = 0.0
    for kind, sizes in shapes:
        digits = re.search(r"\d+", kind)
        width = _WIDTHS.get(kind) if kind in _WIDTHS else int(digits[0]) / 8 if digits else 4
        total += math.prod(sizes) * (width or 0)
    return total


def devices_together(rest: str) -> int:
    """How many devices take part together."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(part.split("=") for part in found[1].split(","))
        parts = (axis.partition(":(") for axis in found[2].split(","))  # 'fsdp':(2)4 is a part of 4 of that axis
        return math.prod(int(part.partition(")")[2] if part else sizes[name]) for name, _, part in parts)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return 2
