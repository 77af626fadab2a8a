"""Machines that need not be here: a kind of accelerator, how many, and how they are joined."""

import math
import re
from dataclasses import dataclass
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.planning.chips import CHIPS, Chip, chip_of

_TEXT = re.compile(r"(?P<kind>[a-z0-9]+):(?P<sizes>\d+(x\d+){0,2})")
# libtpu asks a cloud machine who it is, and lets one process in at a time.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
# What a device's compiler is told of the GPU, as the makers publish it.
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 0, 108, 167936, 2039000000000, 79.2),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 0, 132, 233472, 3350000000000, 79.2),
    "h200": ("NVIDIA H200", 9, 0, 132, 233472, 4800000000000, 139.8),
}


@dataclass(frozen=True)
class Topology:
    """`slices` times a block of chips: a torus of TPUs, hosts x GPUs, or the devices that a CPU is divided into."""

    kind: str
    sizes: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written: `v5p:4x4x8`; of several slices `2 x v5p:4x4x8`."""
        one = f"{self.kind}:{'x'.join(map(str, self.sizes))}"
        return f"{self.slices} x {one}" if self.slices > 1 else one

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.sizes) * self.slices

    @property
    def devices(self) -> int:
        """As jax counts them."""
        return self.chips * (CHIPS[self.kind].cores if self.kind in CHIPS else 1)

    @property
    def hosts(self) -> int:
        """Machines: 4 chips of a TPU each, 8 GPUs, all devices of a CPU."""
        return 1 if self.kind == "cpu" else max(1, self.devices // CHIPS[self.kind].on_host)

    @property
    def chip(self) -> Chip:
        return chip_of(self.kind)

    @property
    def chip_platform(self) -> str:
        """tpu, gpu or cpu."""
        return "cpu" if self.kind == "cpu" else self.chip.platform

    def found(self) -> list[Any]:
        """jax's devices, which need not be here. Raises ConfigError where the compiler for them is not installed."""
        import jax
        from jax.experimental import topologies

        if self.kind == "cpu":
            return list(jax.devices("cpu")[: self.devices])
        platform, name = self.chip.platform, f"{self.kind}:{'x'.join(map(str, self.sizes))}"
        try:
            if platform == "gpu":
                how: dict[str, Any] = {"topology": "x".join(map(str, (1, *self.sizes))), "target_config": self._gpu()}
                return list(topologies.get_topology_desc(how["topology"], "cuda", **how).devices)
            return list(topologies.get_topology_desc(name, "tpu", **self._joined()).devices)
        except Exception as error:  # of the plugin: each version raises another class
            extra = "tpu" if platform == "tpu" else "plan-cuda"
            raise ConfigError(
                f"--topology {name}: the compiler says: {str(error).splitlines()[0][:200]}. It needs a size that the "
                f"makers build, and the compiler: pip install 'rlhfjax[{extra}]'"
            ) from None

    def _joined(self) -> dict[str, Any]:
        """How the chips are joined: a whole cube of v4, v5p or tpu7x is a torus, a part of a v5e or v6e is none."""
        joined: dict[str, Any] = {"chips_per_host_bounds": (2, 2, 1), "num_slices": self.slices}
        joined["chip_config_name"] = "megacore" if self.kind in ("v4", "v5p") else "default"
        return joined | {"wrap": (self.chip.axes == 3 and all(size % 4 == 0 for size in self.sizes),) * 3}

    def _gpu(self) -> str:
        name, major, minor, processors, shared, bandwidth, gib = _GPUS[self.kind]
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {processors} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {int(gib * 2**30)}
  shared_memory_per_block_optin: {shared - 1024} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


def parsed(text: str, slices: int) -> Topology:
    """`v5p:4x4x8`, `h100:8x8` (hosts x GPUs of one). Raises ConfigError for anything else."""
    found = _TEXT.fullmatch(text)
    if not found:
        raise ConfigError(f"--topology: expected KIND:SIZES such as v5p:8x8x8, v6e:16x16 or h100:8x8, got {text!r}")
    chip, sizes = chip_of(found["kind"]), tuple(map(int, found["sizes"].split("x")))
    wanted = chip.axes or 2
    if len(sizes) != wanted or 0 in sizes:
        what = {2: "two sizes", 3: "three sizes"}[wanted]
        example = {0: "h100:8x8 (hosts x GPUs)", 2: "v5e:16x16", 3: "v5p:8x8x8"}[chip.axes]
        raise ConfigError(f"--topology: {chip.name} has {what}, such as {example}; got {text!r}")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise ConfigError(f"--num-slices: expected a number above 0, of TPUs; got {slices} of {chip.name}")
    return Topology(chip.name, sizes, slices)


def of_cpu(devices: int) -> Topology:
    """A CPU that is divided into so many devices."""
    return Topology("cpu", (devices,))
