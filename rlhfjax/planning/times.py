"""How long a program takes: our roofline of published peaks, and what libtpu's own cycles say.

A loop takes as long as the slowest of its products, its memory, its links and its network where all overlap (the
least), and as long as all of them together where none does, with what libtpu reckons for the operations in the place
of peaks where it says so (the most). Latencies of collectives are an assumption, `LATENCY`; devices whose compiler
reckons nothing reach `REACHED` of the peaks then.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhfjax.planning.topology import Topology

LATENCY = 3e-6  # seconds of a collective, beside its bytes
REACHED = 0.6


@dataclass(frozen=True)
class Seconds:
    """An interval, and where in it most programs lie: the mean of both ends."""

    least: float = 0.0
    most: float = 0.0

    @property
    def expected(self) -> float:
        return (self.least + self.most) / 2

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.least + other.least, self.most + other.most)

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(self.least * times, self.most * times)

    def described(self) -> dict[str, float]:
        return {"least": self.least, "expected": self.expected, "most": self.most}


def seconds_of(program: Mapping[str, Any], machine: Topology, chip: Any) -> Seconds:
    """Of one run of a program that `compiler.described` describes."""
    total = Seconds()
    for loop in program["loops"]:
        total += _once(loop, machine, chip) * loop["times"]
    return total


def reckoned_by_compiler(program: Mapping[str, Any], chip: Any) -> float | None:
    """Seconds of libtpu's cycles, collectives apart; None where the compiler says none."""
    return program["cycles"] / chip.clock if chip.clock and program["cycles"] else None


def _once(loop: Mapping[str, Any], machine: Topology, chip: Any) -> Seconds:
    products, memory = loop["flops"] / chip.flops, loop["moved"] / chip.bandwidth
    sent = sum(size / rate(int(group), machine, chip) for group, size, _ in loop["sent"])
    waited = sum(count for _, _, count in loop["sent"]) * LATENCY
    between = loop["between"] / chip.network
    busy = max(products, memory) / REACHED
    if chip.clock and loop["cycles"]:
        busy = loop["cycles"] / chip.clock + loop["kernels"] / chip.flops / REACHED
    least = max(products, memory, sent, between)
    return Seconds(least, max(least, busy + sent + waited + between))


def rate(group: int, machine: Topology, chip: Any) -> float:
    """Bytes/s that a device sends in a ring of so many.

    On a torus a ring has the links of the axes that it goes along, taken for as large a part of all as its devices are
    of the slice by their logarithms. GPUs of one host have all their links, beyond it the network.
    """
    if chip.axes:
        whole = machine.devices // machine.slices
        share = math.log(max(group, 2)) / math.log(max(whole, 2))
        return chip.links * min(1.0, max(share, 1 / chip.axes))
    return chip.links if group <= chip.on_host else chip.network
