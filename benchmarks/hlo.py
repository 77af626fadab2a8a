"""What a compiled program does on one device, from its text: products, and the bytes of its collectives, loop by loop.

`cost_analysis()` counts the body of a loop once; here everything is counted as often as it runs. Collectives stand in
fusions, in asynchronous computations and in the windowed loops that gather weights under a product, so the whole graph
of computations is walked from the entry. Of kernels (custom calls) a text tells the products of grouped rows alone, as
if each row that there is room for were one of a group.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

_WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+(?:e\d+m\d+\w*)?|c\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))")
_GROUPED = re.compile(r"gmm\)+/pallas_call")
KINDS = {
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "collective-permute": "permute",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-broadcast": "permute",
}


@dataclass(frozen=True)
class Instruction:
    """One line: `shapes` are the arrays of its result, `rest` what follows the name of the operation."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str
    root: bool


@dataclass(frozen=True)
class Collective:
    """Bytes of one collective each time it runs: of its result (a reduce-scatter: of its input), and what a device
    sends in a ring of its group."""

    name: str
    kind: str
    shape: str
    result: float
    ring: float


@dataclass
class Loop:
    """The body of a loop, or the entry: what runs in it once, and the loops within."""

    name: str
    trips: int = 1
    flops: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    loops: list["Loop"] = field(default_factory=list)

    def every(self, times: float = 1.0) -> Iterator[tuple["Loop", float]]:
        """This and the loops within, with how often each runs."""
        times *= self.trips
        yield self, times
        for loop in self.loops:
            yield from loop.every(times)

    def of_turns(self, count: int, times: float = 1.0) -> Iterator[tuple["Loop", float]]:
        """The outermost loops of so many turns, as those over layers, and how often each begins.

        One less counts too: XLA may write out the first turn or the last.
        """
        for loop in self.loops:
            if count - 1 <= loop.trips <= count:
                yield loop, times * self.trips
            else:
                yield from loop.of_turns(count, times * self.trips)

    def total_flops(self) -> float:
        return sum(loop.flops * times for loop, times in self.every())

    def total_bytes(self, how: str = "ring") -> float:
        """Bytes of all collectives, `ring` or `result`."""
        return sum(getattr(one, how) * times for loop, times in self.every() for one in loop.collectives)

    def by_kind(self, how: str = "ring") -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for loop, times in self.every():
            for one in loop.collectives:
                sums[one.kind] += getattr(one, how) * times
        return dict(sums)


class Program:
    """The text of a compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                if head[1]:
                    self.entry = head[2]
            elif current is not None and (found := _LINE.match(line)):
                current.append(_instruction(found))

    @cached_property
    def _shapes(self) -> dict[str, tuple]:
        return {one.name: one.shapes for lines in self.computations.values() for one in lines}

    @cached_property
    def _named(self) -> dict[str, Instruction]:
        return {one.name: one for lines in self.computations.values() for one in lines}

    def walked(self) -> Loop:
        """The entry with everything that it runs."""
        loop = Loop(self.entry)
        self._walk(self.entry, loop)
        return loop

    def _walk(self, computation: str, loop: Loop) -> None:
        for one in self.computations.get(computation, ()):
            if one.opcode == "while":
                inner = Loop(_attribute(one.rest, "body"), self.trip_count(one))
                self._walk(inner.name, inner)
                loop.loops.append(inner)
                continue
            if one.opcode in ("dot", "convolution"):
                loop.flops += self._dot(one) if one.opcode == "dot" else self._convolution(one)
            if one.opcode == "custom-call" and _GROUPED.search(one.rest):
                loop.flops += self._grouped(one)
            if collective := self._collective(one, computation):
                loop.collectives.append(collective)
                continue  # its `to_apply` adds two numbers
            branches = ",".join(part for pair in _BRANCHES.findall(one.rest) for part in pair if part)
            if branches:  # the dearest
                taken = [Loop(name.strip(" %")) for name in branches.split(",")]
                for branch in taken:
                    self._walk(branch.name, branch)
                dearest = max(taken, key=lambda b: (b.total_flops(), b.total_bytes()))
                loop.loops.append(dearest)
            elif one.opcode not in ("reduce", "scatter", "sort", "map", "reduce-window", "select-and-scatter"):
                for names in _CALLED.findall(one.rest):
                    for name in names.split(","):
                        self._walk(name.strip(" %"), loop)

    def trip_count(self, loop: Instruction) -> int:
        """From `known_trip_count`, the constant that the index is compared with, or the parts that it goes over."""
        if known := re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        body = _attribute(loop.rest, "body")
        for test in self.computations[_attribute(loop.rest, "condition")]:
            if test.opcode == "compare" and "direction=LT" in test.rest and len(test.operands) == 2:
                end, index = self._constant(test.operands[1]), self._index(test.operands[0])
                if end is None:
                    end = self._initial(loop, self._index(test.operands[1]))
                if end is not None and index is not None:
                    start = self._initial(loop, index) or 0
                    return max(1, math.ceil((end - start) / self._step(body, index)))
        # Experts take another pass only for what is over, where routers are uneven.
        return 1 if "experts" in loop.rest else self._parts_read(body)

    def _parts_read(self, body: str) -> int:
        """How many parts the arrays have of which a turn reads or writes one: a loop that data ends goes so far."""
        counts: Counter[int] = Counter()
        for one in self._within(body):
            whole = self._shapes.get(one.operands[0], ()) if one.operands else ()
            first = "dynamic_slice_sizes={1," in one.rest
            if one.opcode == "dynamic-update-slice":
                part = self._shapes.get(one.operands[1], ())
                first = bool(part and part[0][1] and part[0][1][0] == 1)
            if whole and first and one.opcode in ("dynamic-slice", "dynamic-update-slice") and len(whole[0][1]) > 1:
                counts[whole[0][1][0]] += 1
        return counts.most_common(1)[0][0] if counts else 1

    def _within(self, computation: str) -> Iterator[Instruction]:
        for one in self.computations.get(computation, ()):
            yield one
            if one.opcode == "fusion":
                yield from self._within(_attribute(one.rest, "calls"))

    def _initial(self, loop: Instruction, index: int | None) -> int | None:
        """The number with which an element of a loop's state begins, or what it is at most."""
        state = self._named.get(loop.operands[0])
        if index is None or state is None or state.opcode != "tuple":
            return None
        first = self._source(state.operands[index])
        if first is not None and first.opcode == "minimum":
            return next((n for n in map(self._constant, first.operands) if n is not None), None)
        return self._constant(state.operands[index])

    def _step(self, body: str, index: int) -> int:
        root = next(one for one in self.computations[body] if one.root)
        grown = self._source(root.operands[index]) if root.opcode == "tuple" else None
        if grown is not None and grown.opcode == "add":
            return next((n for n in map(self._constant, grown.operands) if n), 1)
        return 1

    def _source(self, name: str) -> Instruction | None:
        one = self._named.get(name)
        while one is not None and one.opcode in ("bitcast", "copy", "convert", "reshape") and one.operands:
            one = self._named.get(one.operands[0])
        return one

    def _constant(self, name: str) -> int | None:
        one = self._source(name)
        found = re.match(r"constant\((-?\d+)\)", one.rest) if one is not None and one.opcode == "constant" else None
        return int(found[1]) if found else None

    def _index(self, name: str) -> int | None:
        one = self._source(name)
        if one is None or one.opcode != "get-tuple-element":
            return None
        return int(_attribute(one.rest, "index"))

    def _dot(self, one: Instruction) -> float:
        left = self._shapes[one.operands[0]][0][1]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        inner = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(one.shapes[0][1]) * math.prod(inner)

    def _grouped(self, one: Instruction) -> float:
        """Rows [R, D] times a matrix of their group, to [R, F]; or times rows [R, F], to a matrix of each group."""
        out = one.shapes[0][1]
        rows = [shape for name in one.operands for _, shape in self._shapes.get(name, ())[:1] if len(shape) == 2]
        inner = [size for shape in rows if shape[0] == out[0] for size in shape[1:]] if len(out) == 2 else rows[0][:1]
        return 2.0 * math.prod(out[-2:]) * inner[0]

    def _convolution(self, one: Instruction) -> float:
        """XLA writes products for a TPU as these; its batch axes are windows of which one place alone is valid."""
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
        assert labels, one.rest
        left, right = (self._shapes[name][0][1] for name in one.operands[:2])
        out, window = one.shapes[0][1], _window(one.rest)
        valid = 1
        for axis in range(len(labels[1]) - 2):
            sizes = left[labels[1].index(str(axis))], right[labels[2].index(str(axis))], out[labels[3].index(str(axis))]
            valid *= _valid(*sizes, window, axis)
        batch = left[labels[1].index("b")] / window.groups("batch_group_count", one.rest)
        return 2.0 * batch * right[labels[2].index("i")] * right[labels[2].index("o")] * valid

    def _collective(self, one: Instruction, computation: str) -> Collective | None:
        opcode = one.opcode.removesuffix("-start")
        if opcode not in KINDS or one.opcode.endswith("-done"):
            return None
        kind, shapes = KINDS[opcode], one.shapes
        if one.opcode.endswith("-start") and opcode in ("all-gather", "collective-permute", "collective-broadcast"):
            shapes = shapes[len(one.operands) : 2 * len(one.operands)] or shapes
        if kind == "all_reduce" and "all-reduce-scatter" in computation:
            kind = "reduce_scatter"
        elif kind == "reduce_scatter":
            shapes = tuple(shape for name in one.operands for shape in self._shapes.get(name, ()))
        result, n = _bytes(shapes), _group(one.rest)
        shares = {"all_reduce": 2 * (n - 1) / n, "permute": 1.0}
        shown = ", ".join(f"{kind}[{','.join(map(str, sizes))}]" for kind, sizes in shapes[:3])
        return Collective(one.name, kind, shown, result, result * shares.get(kind, (n - 1) / n))


class _window:
    """The `window={…}` of a convolution."""

    def __init__(self, rest: str):
        found = re.search(r"window=\{([^}]*)\}", rest)
        self._parts = dict(part.split("=", 1) for part in found[1].split()) if found else {}

    def of(self, name: str, axis: int, default: str) -> str:
        return self._parts[name].split("x")[axis] if name in self._parts else default

    def groups(self, name: str, rest: str) -> int:
        found = re.search(rf"{name}=(\d+)", rest)
        return int(found[1]) if found else 1


def _valid(size: int, kernel: int, out: int, window: _window, axis: int) -> int:
    """Pairs of a place of the kernel and one of the result that meet an element of the input."""
    stride, low = int(window.of("stride", axis, "1")), int(window.of("pad", axis, "0_0").split("_")[0])
    spread, apart = int(window.of("lhs_dilate", axis, "1")), int(window.of("rhs_dilate", axis, "1"))
    most, count = (size - 1) * spread, 0
    for k in range(kernel):
        for o in range(out) if kernel > 1 else (0,):
            place = o * stride - low + k * apart
            count += 0 <= place <= most and place % spread == 0
    return count if kernel > 1 else out


def _instruction(found: re.Match) -> Instruction:
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
    arrays = tuple((kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _ARRAY.findall(shape))
    return Instruction(found[2], opcode, arrays, operands, rest, bool(found[1]))


def _attribute(rest: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def _bytes(shapes: tuple) -> float:
    total = 0.0
    for kind, sizes in shapes:
        digits = re.search(r"\d+", kind)
        width = _WIDTHS.get(kind) if kind in _WIDTHS else int(digits[0]) / 8 if digits else 4
        total += math.prod(sizes) * (width or 0)
    return total


def _group(rest: str) -> int:
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
