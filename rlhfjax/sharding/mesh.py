"""The device mesh: axes data, fsdp, sequence, tensor, expert, in this order."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from rlhfjax.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor", "expert")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over `devices` (None: all); an axis of -1 takes what the others leave.

    Raises ConfigError when the product does not equal the number of devices.
    """
    sizes, count = [data, fsdp, sequence, tensor, expert], jax.device_count() if devices is None else len(devices)
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if math.prod(sizes) != count:
        shown = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh: expected a product of {count} (the number of devices), got {shown} = {math.prod(sizes)}; "
            "change mesh.* or set one axis to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
