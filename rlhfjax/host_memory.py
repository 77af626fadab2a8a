"""Arrays that lie in the host's memory while no program reads them: moments, and models that nothing trains.

The type of an array says in which memory it lies, and jax computes with those of the device alone. So a program that
reads such arrays moves them (`on_device`), puts what it makes of them where they lay (`back`), and needs no setting: of
arrays on the device it is the program that it would be without.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from rlhfjax.errors import ConfigError

HOST, DEVICE = "pinned_host", "device"


def on_host(x: Any) -> bool:
    """Whether an array, a shape, or what stands for one in a trace, lies in the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(tree: Any) -> Any:
    """The same arrays or shapes on the device; those that are there already are not touched."""
    return jax.tree.map(lambda x: _moved(x, DEVICE) if on_host(x) else x, tree)


def to_host(tree: Any) -> Any:
    """The same arrays or shapes in the host's memory; each device's part in that of its own host."""
    return jax.tree.map(lambda x: x if on_host(x) else _moved(x, HOST), tree)


def back(tree: Any, lay: Any) -> Any:
    """In a trace: results in the memory in which the arrays of an equal tree `lay`."""
    return jax.tree.map(lambda new, old: jax.device_put(new, jax.memory.Space.Host) if on_host(old) else new, tree, lay)


def _moved(x: Any, kind: str) -> Any:
    if isinstance(x, Tracer):
        return jax.device_put(x, jax.memory.Space.Host if kind == HOST else jax.memory.Space.Device)
    place = x.sharding.with_memory_kind(kind)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.device_put(x, place)


def require_host_memory(devices: Sequence[Any], key: str = "mesh") -> None:
    """Raises ConfigError where programs on these devices cannot read the host's memory."""
    device = devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"{key}.offload: expected devices with a memory {HOST}, got {device.platform} with {', '.join(kinds)}; "
            f"give {key}.offload none"
        )
