"""Accelerators as their makers publish them: one table, which every time and every limit of a plan is taken from.

TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x; the pages of their system architectures and of their machine
types), the network of hosts as "How to Scale Your Model" (jax-ml.github.io/scaling-book, part 2) gives it, and memory
as libtpu 0.0.52 names it where a program is larger. GPUs: the data sheets of NVIDIA's A100, H100 SXM and H200 SXM, and
one 400 Gbit/s port for each GPU, as in DGX H100 and its kin (A100: 200). Rates are in one direction.
"""

from dataclasses import dataclass
from typing import Literal

from rlhfjax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as jax counts them: half a chip of tpu7x, a chip of the other TPUs.

    `flops` are bfloat16 products, FLOP/s; `memory` is what programs can have, bytes; `bandwidth` that of the memory,
    `links` what it sends to others of its slice, or of its machine, on all links together, `network` its part of what
    its host sends to other hosts, bytes/s. `axes` are those of the torus that the links make, 0 where each device
    reaches each other by a switch. `clock` is in Hz.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    flops: float
    memory: int
    bandwidth: float
    links: float
    network: float
    axes: int
    on_host: int
    host_memory: int
    clock: float = 0.0
    cores: int = 1  # devices of one chip


def _tpu(name: str, flops: float, gib: float, bandwidth: float, gbits: float, network: float, **rest) -> Chip:
    defaults = {"axes": 3, "on_host": 4, "host_memory": 400 * 10**9, "clock": 1.75e9}
    return Chip(name, "tpu", flops, int(gib * GIB), bandwidth, gbits * 1e9 / 8, network, **(defaults | rest))


def _gpu(name: str, flops: float, gib: float, bandwidth: float, links: float, network: float) -> Chip:
    # Of what a GPU has, XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 is given to programs, as the launch files say.
    return Chip(name, "gpu", flops, int(0.9 * gib * GIB), bandwidth, links, network, 0, 8, 2 * 10**12)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275e12, 30.5, 1.23e12, 2400, 6.25e9, clock=1.05e9, host_memory=407 * 10**9),
        _tpu("v5e", 197e12, 15.75, 0.82e12, 1600, 3.125e9, axes=2, clock=1.5e9, host_memory=192 * 10**9),
        _tpu("v5p", 459e12, 95.73, 2.765e12, 4800, 6.25e9, host_memory=448 * 10**9),
        _tpu("v6e", 918e12, 31.24, 1.64e12, 3584, 12.5e9, axes=2, host_memory=720 * 10**9),
        _tpu("tpu7x", 1153.5e12, 94.74, 3.69e12, 4800, 6.25e9, on_host=8, host_memory=960 * 10**9, cores=2),
        _gpu("a100", 312e12, 79.2, 2.039e12, 300e9, 25e9),
        _gpu("h100", 989e12, 79.2, 3.35e12, 450e9, 50e9),
        _gpu("h200", 989e12, 139.8, 4.8e12, 450e9, 50e9),
    )
}


def chip_of(name: str) -> Chip:
    """The chip of a name. Raises ConfigError that names those there are."""
    if name not in CHIPS:
        raise ConfigError(f"--topology: expected a kind among {', '.join(CHIPS)}, got {name!r}")
    return CHIPS[name]


def this_machine(devices: int, flops: float, memory: int) -> Chip:
    """A CPU that is divided into so many devices, with what all of them can do together, and the memory of each."""
    rate = 100e9 / devices  # of caches and memory, which all share: a guess, as times of a CPU are
    return Chip("cpu", "cpu", flops / devices, memory, rate, rate, rate, 0, devices, memory * devices)
