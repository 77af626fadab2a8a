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

from rlhfjax.planning.hlo_kernels import attention, products
from rlhfjax.planning.hlo_text import (
    HEAD,
    LINE,
    Instruction,
    Window,
    attribute,
    bytes_of,
    devices_together,
    instruction,
    places,
)
from rlhfjax.planning.hlo_traffic import Traffic, cycles_of

_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))")
# Products of queries with the cache of a sampler, which meet the keys of all heads (`models/stacked_cache.py`).
_CACHED = re.compile(r"/bh[cs],bsc->bh[cs]/")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
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
class Collective:
    """Bytes of one collective each time it runs: of its result (a reduce-scatter: of its input), and what a device
    sends in a ring of its `group`, so many devices."""

    name: str
    kind: str
    shape: str
    result: float
    ring: float
    group: int = 2


@dataclass
class Loop:
    """The body of a loop, or the entry: what runs in it once, and the loops within."""

    name: str
    trips: int = 1
    source: str = ""  # the path of operations that it comes from
    flops: float = 0.0
    cached_flops: float = 0.0  # of attention in a sampler, not among `flops`
    attended_flops: float = 0.0  # of attention kernels, not among `flops`
    kernel_flops: float = 0.0  # of all kernels, for which the compiler reckons no cycles
    moved: float = 0.0  # bytes that its operations read and write in the device's memory
    cycles: float = 0.0  # that libtpu reckons for them; collectives have none
    between: dict[str, float] = field(default_factory=dict)  # bytes that go to other slices, by what for
    collectives: list[Collective] = field(default_factory=list)
    loops: list["Loop"] = field(default_factory=list)
    open: bool = False  # data alone end it: nothing says how often it runs

    def bound(self, turns: int) -> None:
        """Let open loops with products, and none of them inside, run so often: those of a sampler, by its tokens."""
        for loop in self.loops:
            loop.bound(turns)
            inner = [within for within, _ in loop.every() if within is not loop and within.open]
            if loop.open and loop.flops and not any(within.flops for within in inner):
                loop.trips = turns

    def every(self, times: float = 1.0) -> Iterator[tuple["Loop", float]]:
        """This and the loops within, with how often each runs."""
        times *= self.trips
        yield self, times
        for loop in self.loops:
            yield from loop.every(times)

    def of_turns(self, count: int, times: float = 1.0) -> Iterator[tuple["Loop", float]]:
        """The outermost loops of so many turns, as those over layers, and how often each begins.

        One less counts too: XLA may write out the first turn or the last. No loop over layers is inside `shard_map`,
        where a loop over tokens may have as many turns.
        """
        for loop in self.loops:
            if count - 1 <= loop.trips <= count and "shard_map" not in loop.source:
                yield loop, times * self.trips
            else:
                yield from loop.of_turns(count, times * self.trips)

    def total(self, what: str) -> float:
        """The sum of a count of every loop, `flops`, `cached_flops`, `moved` or `cycles`."""
        return sum(getattr(loop, what) * times for loop, times in self.every())

    def total_between(self) -> dict[str, float]:
        """Bytes that a device sends to other slices, through hosts and their network: no ring has them."""
        sums: Counter[str] = Counter()
        for loop, times in self.every():
            sums.update({what: size * times for what, size in loop.between.items()})
        return dict(sums)

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
            if head := HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                if head[1]:
                    self.entry = head[2]
            elif current is not None and (found := LINE.match(line)):
                current.append(instruction(found))

    @cached_property
    def _shapes(self) -> dict[str, tuple]:
        return {one.name: one.shapes for lines in self.computations.values() for one in lines}

    @cached_property
    def _traffic(self) -> Traffic:
        return Traffic(self.computations)

    @cached_property
    def _named(self) -> dict[str, Instruction]:
        return {one.name: one for lines in self.computations.values() for one in lines}

    def walked(self) -> Loop:
        """The entry with everything that it runs."""
        loop = Loop(self.entry)
        self._walk(self.entry, loop)
        return loop

    def _walk(self, computation: str, loop: Loop, fused: bool = False) -> None:
        for one in self.computations.get(computation, ()):
            if not fused:
                loop.moved += self._traffic.of(one)
                loop.cycles += cycles_of(one.rest)
            if one.opcode == "while":
                path = re.search(r'op_name="([^"]*)"', one.rest)
                turns = self.trip_count(one)
                inner = Loop(attribute(one.rest, "body"), turns or 1, path[1] if path else "", open=not turns)
                self._walk(inner.name, inner)
                loop.loops.append(inner)
                continue
            if one.opcode in ("dot", "convolution"):
                flops = self._dot(one) if one.opcode == "dot" else self._convolution(one)
                if _CACHED.search(one.rest):
                    loop.cached_flops += flops
                else:
                    loop.flops += flops
            if one.opcode == "send" and (what := _BETWEEN.search(one.rest)):
                kind = what[1].lower()
                loop.between[kind] = loop.between.get(kind, 0.0) + bytes_of(one.shapes[:1])
            if one.opcode == "custom-call":
                multiplied, attended = products(one, self._shape), attention(one, self._shape)
                loop.flops += multiplied
                loop.attended_flops += attended
                loop.kernel_flops += multiplied + attended
            if collective := self._collective(one, computation):
                loop.collectives.append(collective)
                continue  # its `to_apply` adds two numbers
            branches = ",".join(part for pair in _BRANCHES.findall(one.rest) for part in pair if part)
            if branches:  # the dearest
                taken = [Loop(name.strip(" %")) for name in branches.split(",")]
                for branch in taken:
                    self._walk(branch.name, branch)
                dearest = max(taken, key=lambda b: (b.total("flops"), b.total_bytes()))
                loop.loops.append(dearest)
            elif one.opcode not in ("reduce", "scatter", "sort", "map", "reduce-window", "select-and-scatter"):
                for names in _CALLED.findall(one.rest):
                    for name in names.split(","):
                        self._walk(name.strip(" %"), loop, fused or one.opcode == "fusion")

    def trip_count(self, loop: Instruction) -> int:
        """From `known_trip_count`, the constant that the index is compared with, or the parts that it goes over.

        0 where nothing says it.
        """
        if known := re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        body = attribute(loop.rest, "body")
        for test in self.computations[attribute(loop.rest, "condition")]:
            if test.opcode == "compare" and "direction=LT" in test.rest and len(test.operands) == 2:
                end, index = self._constant(test.operands[1]), self._index(test.operands[0])
                if end is None:
                    end = self._initial(loop, self._index(test.operands[1]))
                if end is not None and index is not None:
                    start = self._initial(loop, index) or 0
                    return max(1, math.ceil((end - start) / self._step(body, index)))
        # Experts take another pass only for what is over, where routers are uneven.
        return 1 if "experts" in loop.rest.lower() else self._parts_read(body)

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
        return counts.most_common(1)[0][0] if counts else 0

    def _within(self, computation: str) -> Iterator[Instruction]:
        for one in self.computations.get(computation, ()):
            yield one
            if one.opcode == "fusion":
                yield from self._within(attribute(one.rest, "calls"))

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

    def _shape(self, name: str) -> tuple[int, ...] | None:
        shapes = self._shapes.get(name)
        return shapes[0][1] if shapes else None

    def _constant(self, name: str) -> int | None:
        one = self._source(name)
        found = re.match(r"constant\((-?\d+)\)", one.rest) if one is not None and one.opcode == "constant" else None
        return int(found[1]) if found else None

    def _index(self, name: str) -> int | None:
        one = self._source(name)
        if one is None or one.opcode != "get-tuple-element":
            return None
        return int(attribute(one.rest, "index"))

    def _dot(self, one: Instruction) -> float:
        left = self._shapes[one.operands[0]][0][1]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        inner = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(one.shapes[0][1]) * math.prod(inner)

    def _convolution(self, one: Instruction) -> float:
        """XLA writes products for a TPU as these; its batch axes are windows of which one place alone is valid."""
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
        assert labels, one.rest
        left, right = (self._shapes[name][0][1] for name in one.operands[:2])
        out, window = one.shapes[0][1], Window(one.rest)
        valid = 1
        for axis in range(len(labels[1]) - 2):
            sizes = left[labels[1].index(str(axis))], right[labels[2].index(str(axis))], out[labels[3].index(str(axis))]
            valid *= places(*sizes, window, axis)
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
        result, n = bytes_of(shapes), devices_together(one.rest)
        shares = {"all_reduce": 2 * (n - 1) / n, "permute": 1.0}
        shown = ", ".join(f"{kind}[{','.join(map(str, sizes))}]" for kind, sizes in shapes[:3])
        return Collective(one.name, kind, shown, result, result * shares.get(kind, (n - 1) / n), n)
