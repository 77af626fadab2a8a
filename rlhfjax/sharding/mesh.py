"""The device mesh: axes data, fsdp, sequence, tensor, expert, in this order."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlhfjax.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor", "expert")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    expert: int = 1,
    *,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over `devices` (None: all); an axis of -1 takes what the others leave.

    The outermost part of `data` crosses `slices`, so that all other axes lie within one. Devices that know of none,
    CPUs and GPUs, are in slices in their order. Raises ConfigError when the product does not equal the number of
    devices, or when these are of another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, sequence, tensor, expert], len(devices)
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if math.prod(sizes) != count:
        shown = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh: expected a product of {count} (the number of devices), got {shown} = {math.prod(sizes)}; "
            "change mesh.* or set one axis to -1"
        )
    if sizes[0] % slices:
        raise ConfigError(f"mesh.data {sizes[0]} must be a multiple of mesh.slices {slices}")
    on_torus = devices[0].platform == "tpu"
    arranged = _on_torus(sizes, slices, devices) if on_torus else mesh_utils.create_device_mesh(sizes, devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _on_torus(sizes: Sequence[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """TPUs so that the axes follow the links between them; one that no links follow is laid across several."""
    there = len({getattr(device, "slice_index", None) for device in devices})
    if there != slices:
        raise ConfigError(f"mesh.slices: expected {there}, as these {len(devices)} devices are in, got {slices}")
    if slices > 1:
        inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    try:
        return jax.make_mesh(tuple(sizes), AXES, devices=devices).devices
    except NotImplementedError:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
