"""What a plan says of a stage, beside what is measured of it. Nothing that is trained on depends on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

APART = 0.2  # a share of what was planned by which a measurement may differ before it is said


@dataclass
class Expected:
    """Seconds of the units of a step, by the names of their metrics (`timing/update_s`), and bytes of a device."""

    seconds: Mapping[str, float]
    peak: int
    _said: set[str] = field(default_factory=set)

    def compared(self, row: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, float]:
        """Measured over planned, of the step and of the device's memory where it says how much it took.

        What parts by more than a fifth is noted once.
        """
        measured = {name: float(row[name]) for name in self.seconds if name in row}
        planned = {name: self.seconds[name] for name in measured}
        ratios = {"plan/step_ratio": sum(measured.values()) / sum(planned.values())} if sum(planned.values()) else {}
        if self.peak and (peak := peak_here()):
            ratios["plan/memory_ratio"] = peak / self.peak
        for name in measured:
            self._judge(name.removeprefix("timing/").removesuffix("_s"), measured[name], planned[name], "s", note)
        if "plan/memory_ratio" in ratios:
            self._judge("memory", ratios["plan/memory_ratio"] * self.peak / 2**30, self.peak / 2**30, "GiB", note)
        return ratios

    def _judge(self, name: str, measured: float, planned: float, unit: str, note: Callable[[str], None]) -> None:
        if planned and abs(measured / planned - 1) > APART and name not in self._said:
            self._said.add(name)
            note(f"{name} takes {measured:.3g} {unit}, {measured / planned:.2f} times the {planned:.3g} of the plan")


def peak_here() -> int:
    """The most bytes that the first device of this process has held; 0 where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return int(stats.get("peak_bytes_in_use", 0)) if stats else 0
