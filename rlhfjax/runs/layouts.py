"""The processes and devices of a run that shall be done again, and whether this machine can start as many."""

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfjax.errors import IntegrityError

_ASK = "import jax; print(jax.default_backend(), jax.local_device_count())"


@dataclass(frozen=True)
class Layout:
    """So many processes with so many devices each."""

    processes: int
    devices: int
    backend: str
    kind: str

    def __str__(self) -> str:
        processes = f"{self.processes} processes" if self.processes > 1 else "1 process"
        return f"{processes} with {self.devices} x {self.kind}" + (" each" if self.processes > 1 else "")


def layout_of(attempts: Sequence[Mapping[str, Any]]) -> Layout | None:
    """The layout of the last attempt that trained anything; None where the devices of its processes are not alike."""
    last = next((line for line in reversed(attempts) if line.get("stages", True)), attempts[-1])
    devices, processes = last.get("devices", []), int((last.get("process") or [0, 1])[1])
    if not devices or len(devices) % processes:
        return None
    return Layout(processes, len(devices) // processes, last.get("backend", ""), Counter(devices).most_common(1)[0][0])


def launched_here(run_dir: Path, attempts: Sequence[Mapping[str, Any]]) -> Layout | None:
    """The layout that has to be started on this machine to have that of the run; None where this process has it.

    CPUs are split into as many devices as it takes. Raises IntegrityError, which says what is needed, where this
    machine has not as many accelerators.
    """
    layout = layout_of(attempts)
    if layout is not None and layout.processes == 1:
        return layout if layout.backend == "cpu" and not _has(layout.devices) else None
    if layout is not None and layout.backend == "cpu":
        return layout
    backend, count = _devices_here()
    if layout is not None and layout.backend == backend == "gpu" and count >= layout.processes * layout.devices:
        return layout
    needed = layout or "processes that did not have the same number of devices each"
    raise IntegrityError(
        f"{run_dir} cannot be reproduced here: it ran in {needed}, and this machine has {count} x {backend}; start "
        f"`rlhfjax reproduce {run_dir}` in as many processes as the run was started in, in the same way"
    )


def _has(devices: int) -> bool:
    """Whether jax has so many CPU devices in this process. What it has otherwise is said by whoever compares."""
    import jax

    return jax.default_backend() != "cpu" or jax.device_count() == devices


def _devices_here() -> tuple[str, int]:
    """Asked in a process of its own: one that asks takes the memory of GPUs."""
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return (words[0], int(words[1])) if done.returncode == 0 and len(words) == 2 else ("no device", 0)
