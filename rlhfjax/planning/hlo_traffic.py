"""What operations of a compiled program read and write in the memory of a device, and the cycles libtpu gives them."""

import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property

from rlhfjax.planning.hlo_text import Instruction, attribute, bytes_of

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**62  # what stands where there is no estimate is more
# What moves nothing by itself: names for what is there already, and what is counted where it runs.
_STILL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("copy-done", "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-done", "async-update"),
}
_READS_A_PART = ("dynamic-slice", "gather", "slice")
_REPLACES_A_PART = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the part


def cycles_of(rest: str) -> float:
    """The cycles that libtpu reckons for an operation, 0 where it says none."""
    found = _CYCLES.search(rest)
    return float(found[1]) if found and int(found[1]) < _UNKNOWN else 0.0


class Traffic:
    """Bytes by operation. Of an array of which a part is read or written, that part counts.

    Arrays in a core's own memory do not count: what brings them there does.
    """

    def __init__(self, computations: Mapping[str, Sequence[Instruction]]):
        self._computations = computations

    @cached_property
    def _named(self) -> dict[str, Instruction]:
        return {one.name: one for lines in self._computations.values() for one in lines}

    def of(self, one: Instruction) -> float:
        """What one operation reads and writes each time it runs."""
        if one.opcode in _STILL or one.opcode.endswith("-done"):
            return 0.0
        if one.opcode == "fusion":
            return self._fusion(one)
        if one.opcode in _READS_A_PART:
            return 2 * self._far(one)
        if one.opcode in _REPLACES_A_PART:
            return 2 * self._size(one.operands[_REPLACES_A_PART[one.opcode]])
        if one.opcode == "copy-start":
            return self._size(one.operands[0]) + self._far(one, 1)
        return self._far(one) + sum(self._size(name) for name in one.operands)

    def _fusion(self, one: Instruction) -> float:
        called = attribute(one.rest, "calls")
        read = sum(min(self._size(name), self._read(called, place)) for place, name in enumerate(one.operands))
        return read + min(self._far(one), self._written(called))

    def _read(self, computation: str, place: int) -> float:
        """Of the argument at a place, all of it unless each of its users takes or replaces a part."""
        parameter = next((p for p in self._parameters(computation) if p.rest.startswith(f"parameter({place})")), None)
        return self._used(computation, parameter.name) if parameter is not None else float("inf")

    def _used(self, computation: str, name: str) -> float:
        size = 0.0
        for user in self._users(computation).get(name, ()):
            first = user.operands[0] == name
            if user.opcode == "bitcast" and not user.root:
                size += self._used(computation, user.name)
            elif user.opcode == "fusion":
                called = attribute(user.rest, "calls")
                size += sum(self._read(called, place) for place, used in enumerate(user.operands) if used == name)
            elif user.opcode in _READS_A_PART and first:
                size += bytes_of(user.shapes)
            elif not (user.opcode in _REPLACES_A_PART and first):
                return float("inf")
        return size

    def _written(self, computation: str) -> float:
        root = next((line for line in self._computations.get(computation, ()) if line.root), None)
        while root is not None and root.opcode == "bitcast":
            root = self._named.get(root.operands[0])
        if root is not None and root.opcode == "fusion":
            return self._written(attribute(root.rest, "calls"))
        if root is not None and root.opcode in _REPLACES_A_PART:
            part = self._named.get(root.operands[_REPLACES_A_PART[root.opcode]])
            return bytes_of(part.shapes) if part is not None else 0.0
        return float("inf")

    def _parameters(self, computation: str) -> list[Instruction]:
        return [line for line in self._computations.get(computation, ()) if line.opcode == "parameter"]

    @cache  # noqa: B019  (of one program, which is read once)
    def _users(self, computation: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for line in self._computations.get(computation, ()):
            for name in dict.fromkeys(line.operands):
                users.setdefault(name, []).append(line)
        return users

    def _size(self, name: str) -> float:
        one = self._named.get(name)
        return self._far(one) if one is not None else 0.0

    def _far(self, one: Instruction, count: int | None = None) -> float:
        """Bytes of those of its arrays (of the first `count`) that lie in the device's memory."""
        near = one.near or (False,) * len(one.shapes)
        return bytes_of(tuple(shape for shape, at in zip(one.shapes, near, strict=True) if not at)[:count])
