"""What a launch file asks for: chips, hosts, time to save, memory and disk. From a plan, or by arithmetic alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rlhfjax.errors import ConfigError

Platform = Literal["tpu", "gpu", "cpu"]
GRACE_S = 300  # seconds to save, where no plan says how long it takes
_SIZES = ("slices", "devices", "hosts", "devices_per_host", "grace_s")  # at least 1; bytes may be 0: not known


@dataclass(frozen=True)
class Chip:
    """A kind of TPU: devices that jax has of a chip, the slice's dimensions, and what others call it."""

    devices: int
    dimensions: int
    gke: str  # label cloud.google.com/gke-tpu-accelerator
    type_name: str  # of an accelerator type such as v5p-128
    counted: int  # of a chip, in the number of an accelerator type
    runtime: str | None = None  # of TPU machines without a cluster


_CHIPS_PER_HOST = 4
CHIPS = {
    "v4": Chip(1, 3, "tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Chip(1, 2, "tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Chip(1, 3, "tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Chip(1, 2, "tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Chip(2, 3, "tpu7x", "tpu7x", 2),
}


@dataclass(frozen=True)
class Needs:
    """What one run takes: `slices` of `topology` with `hosts` hosts and `devices` devices in all.

    A process runs on each host. `topology` is KIND:AxBxC of TPUs (one slice), KIND:HOSTSxN of GPUs, or cpu:N.
    `grace_s` is what a save takes at most, in seconds. `host_memory_bytes` of each host and `disk_bytes` of the run
    directory are 0 where nobody knows.
    """

    platform: Platform
    topology: str
    slices: int
    devices: int
    hosts: int
    devices_per_host: int
    grace_s: int
    host_memory_bytes: int
    disk_bytes: int

    def __post_init__(self) -> None:
        if self.platform not in get_args(Platform):
            raise ConfigError(f"needs.platform: expected {', '.join(get_args(Platform))}, got {self.platform!r}")
        for name in (*_SIZES, "host_memory_bytes", "disk_bytes"):
            size, least = getattr(self, name), int(name in _SIZES)
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise ConfigError(f"needs.{name}: expected a whole number, {least} or more, got {size!r}")
        if self.devices != self.hosts * self.devices_per_host:
            raise ConfigError(
                f"needs.devices: expected hosts x devices_per_host = {self.hosts * self.devices_per_host}, "
                f"got {self.devices}"
            )
        if self.hosts % self.slices:
            raise ConfigError(f"needs.hosts: expected a multiple of slices, {self.slices}, got {self.hosts}")
        if self.platform != "tpu" and self.slices > 1:
            raise ConfigError(f"needs.slices: expected 1 without TPUs, got {self.slices}")
        per_chip, sizes = _sizes_of(self.platform, self.topology)
        if self.devices != math.prod(sizes) * per_chip * self.slices:
            raise ConfigError(
                f"needs.devices: expected {math.prod(sizes) * per_chip * self.slices}, which {self.slices} x "
                f"{self.topology} are, got {self.devices}"
            )

    @property
    def hosts_per_slice(self) -> int:
        return self.hosts // self.slices

    @property
    def chips_per_host(self) -> int:
        """What a host's scheduler counts: TPU chips, of which some kinds are two devices, or GPUs."""
        return self.devices_per_host // (slice_of(self.topology)[0].devices if self.platform == "tpu" else 1)

    @property
    def accelerator_type(self) -> str:
        """The slice as XPK and `gcloud` name it, such as v5p-128; of GPUs their kind."""
        if self.platform != "tpu":
            return self.topology.partition(":")[0]
        chip, shape = slice_of(self.topology)
        return f"{chip.type_name}-{math.prod(shape) * chip.counted}"


def of_plan(plan: Mapping[str, Any]) -> Needs:
    """What a plan, as its JSON file has it, says that the run takes: its key `needs`.

    Raises ConfigError where the plan says that the run does not fit, with its first reason and remedy, and where
    something is missing, unknown or makes no sense.
    """
    if plan.get("fits") is not True:
        reasons, remedies = (plan.get(key) or [None] for key in ("reasons", "remedies"))
        remedy = _remedy(remedies[0])
        why = reasons[0] or "it does not say why"
        raise ConfigError(f"the plan does not fit: {why}" + (f"\n  {remedy}" if remedy else ""))
    given, names = plan.get("needs"), [field.name for field in fields(Needs)]
    if not isinstance(given, Mapping):
        raise ConfigError(f"the plan's needs: expected an object with {', '.join(names)}; make the plan anew")
    if lacking := [name for name in names if name not in given]:
        raise ConfigError(f"the plan's needs: expected {', '.join(lacking)} as well; make the plan anew")
    if unknown := sorted(given.keys() - set(names)):
        raise ConfigError(f"the plan's needs: {', '.join(unknown)}: expected {', '.join(names)} alone")
    return Needs(**given)


def of_topology(topology: str, nodes: int | None, slices: int) -> Needs:
    """What can be counted without a plan: devices and hosts of slices or nodes. Memory and disk are not known.

    `topology` is KIND:AxBxC (TPUs), KIND:HOSTSxN or KIND:N (GPUs, the latter of each of `nodes`), or cpu. Raises
    ConfigError where the numbers do not fit each other.
    """
    kind, _, rest = topology.partition(":")
    if kind in CHIPS:
        return _of_slices(topology, nodes, slices)
    if slices != 1:
        raise ConfigError(f"--slices: expected 1 without TPUs, got {slices}; use --nodes")
    given = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", rest)
    if topology != "cpu" and not (given and re.fullmatch("[a-z0-9][a-z0-9-]*", kind)):
        raise ConfigError(
            f"--topology: expected KIND:AxBxC of TPUs ({', '.join(CHIPS)}), KIND:HOSTSxN of GPUs such as h100:2x8, or "
            f"cpu, got {topology!r}"
        )
    said = int(given[1]) if given and given[1] else None
    if nodes is None and said is None:
        raise ConfigError("--nodes: expected the number of nodes, got none")
    if None not in (nodes, said) and nodes != said:
        raise ConfigError(f"--nodes: expected {said}, which {topology} has, got {nodes}")
    hosts, each = nodes or said or 1, int(given[2]) if given else 1
    if kind == "cpu":
        return Needs("cpu", f"cpu:{hosts * each}", 1, hosts * each, hosts, each, GRACE_S, 0, 0)
    return Needs("gpu", f"{kind}:{hosts}x{each}", 1, hosts * each, hosts, each, GRACE_S, 0, 0)


def _of_slices(topology: str, nodes: int | None, slices: int) -> Needs:
    chip, shape = slice_of(topology)
    chips = math.prod(shape)
    hosts, left = divmod(chips, min(chips, _CHIPS_PER_HOST))
    if left:
        raise ConfigError(f"--topology: expected a multiple of {_CHIPS_PER_HOST} chips, a host's, got {topology}")
    if nodes not in (None, hosts * slices):
        raise ConfigError(f"--nodes: expected {hosts * slices}, which {slices} x {topology} have, got {nodes}")
    devices = chips * chip.devices
    return Needs("tpu", topology, slices, devices * slices, hosts * slices, devices // hosts, GRACE_S, 0, 0)


def _sizes_of(platform: str, topology: str) -> tuple[int, tuple[int, ...]]:
    """Devices of a chip, and how many chips there are in each direction."""
    if platform == "tpu":
        chip, shape = slice_of(topology)
        return chip.devices, shape
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*:[1-9]\d*(x[1-9]\d*)?", topology):
        raise ConfigError(f"needs.topology: expected KIND:HOSTSxN, such as h100:2x8, or cpu:N, got {topology!r}")
    return 1, tuple(map(int, topology.partition(":")[2].split("x")))


def slice_of(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The kind of TPU and the shape that KIND:AxBxC names. Raises ConfigError."""
    kind, _, shape = topology.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(f"topology: expected KIND:AxBxC, KIND one of {', '.join(CHIPS)}, got {topology!r}")
    sides = tuple(map(int, shape.split("x")))
    if len(sides) != chip.dimensions:
        raise ConfigError(f"topology: expected {chip.dimensions} sides of {kind}, got {topology!r}")
    return chip, sides


def _remedy(of_plan: Any) -> str:
    """What to do, in a line; a plan's remedy is overrides and what they come to."""
    if not isinstance(of_plan, Mapping):
        return str(of_plan or "")
    return f"give {' '.join(map(str, of_plan.get('overrides', ())))}: {of_plan.get('said', '')}"
