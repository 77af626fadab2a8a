"""The target that programs are built for: a platform, and the sizes that the machine decides where nobody else does.

A product, a sum or an attention kernel is another program on another platform, and one of other sizes rounds otherwise.
So both are one value: resolved once, from the devices of a mesh or of this machine, and set around everything that is
traced for it. Models and algorithms read `current` and hear of no mesh. jax keeps the programs of each target apart.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import jax

_ALIASES = {"cuda": "gpu", "rocm": "gpu"}
_MOST_BLOCKS = 16


@dataclass(frozen=True)
class Target:
    """What a program is built for.

    `platform` is cpu, gpu or tpu, `capability` the compute capability of an NVIDIA GPU (9.0 is Hopper). The others are
    sizes: each changes a program, and with it the last bits of what it computes.
    """

    platform: str
    slots: int  # rows that decode at a time, on all devices together
    blocks: int  # pieces of outputs that each matrix of a sampler is cut into
    part_tokens: int  # tokens that a device reads at a time, at least: packed rows of a part
    most_parts: int  # a minibatch is read in at most so many parts; 0: in any number of them
    chunk_bytes: int  # float32 logits that exist at a time
    unrolled_layers: int  # a loop over at most so many layers is written out
    capability: float | None = None

    def facts(self) -> dict[str, Any]:
        """Plain data, for a manifest."""
        return asdict(self)


SIZES = tuple(field.name for field in fields(Target) if field.name not in ("platform", "capability"))


def target_of(
    where: jax.sharding.Mesh | Sequence[Any] | None = None, sizes: Mapping[str, int | None] | None = None
) -> Target:
    """The target of programs that run on all devices of a mesh, or on these (None: on those that are here).

    `sizes` that are not None stand in the place of the machine's. Devices that are not here, as those of a topology,
    will do. Raises ValueError for a size that no target has.
    """
    devices = list(where.devices.flat) if isinstance(where, jax.sharding.Mesh) else list(where or jax.devices())
    platform = str(devices[0].platform)
    platform = _ALIASES.get(platform, platform)
    given = {name: size for name, size in (sizes or {}).items() if size is not None}
    if unknown := given.keys() - set(SIZES):
        raise ValueError(f"expected sizes among {', '.join(SIZES)}, got {', '.join(sorted(unknown))}")
    own = _on_cpus(len(devices)) if platform == "cpu" else _on_accelerators(len(devices))
    return Target(platform, **own | given, capability=_capability(devices[0]) if platform == "gpu" else None)


def _on_cpus(devices: int) -> dict[str, int]:
    """A step of decoding costs a CPU as much as it has rows, and what a part or a chunk holds should stay in a cache.

    A product of few rows uses one thread, so its matrix is cut into as many blocks as a device has to itself. Devices
    of all processes count, so that their number by process changes no sum.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "slots": 16 * devices,
        "blocks": max(1, min(cores // devices, _MOST_BLOCKS)),
        "part_tokens": 512,
        "most_parts": 0,
        "chunk_bytes": 2**23,
        "unrolled_layers": 8,
    }


def _on_accelerators(devices: int) -> dict[str, int]:
    """More rows are almost free there, and the device has to be kept busy."""
    return {
        "slots": 256 * devices,
        "blocks": 1,
        "part_tokens": 8192,
        "most_parts": 4,
        "chunk_bytes": 2**28,
        "unrolled_layers": 0,
    }


def _capability(device: Any) -> float | None:
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # no GPU of NVIDIA's
        return None


@cache
def machine() -> Target:
    """The target of this machine, as it was when it was first asked for. Starts the devices."""
    return target_of()


# Part of the key of each trace and program, and of the thread; None is the machine's own.
_building: Any = jax.make_user_context(None)


@contextmanager
def building_for(target: Target) -> Iterator[None]:
    """Within, what is traced is built for `target`, and jax finds no program that was built for another.

    It holds in this thread alone: one that traces for another gives it `current()` of that one.
    """
    with _building(None if target == machine() else target):
        yield


def current() -> Target:
    """The target of what is traced now: that of the `building_for` around it, else the machine's own."""
    return _building.value or machine()
