"""A model of somebody else, opened but not read, and its parameters laid out a part at a time."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from rlhfjax.interop.families import Weight
from rlhfjax.interop.tensors import by_span
from rlhfjax.leaves import MOST, Region, inside, read
from rlhfjax.models import DecoderConfig, LanguageModel
from rlhfjax.sharding import state_shardings
from rlhfjax.sharding.rules import path_name
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.types import Params


@dataclass(frozen=True)
class Pretrained:
    """What a source says of its model, and how to read it.

    `read(weight, name, region)` gives a region of our parameter, of one layer, in any float type, and reads no more of
    the files than that takes; `name` is `weight.name` with the numbers of layer and expert in it. A scalar model
    (`role` "reward") has a `head` beside.
    """

    config: DecoderConfig
    role: str
    tokenizer: AnyTokenizer | None
    weights: tuple[Weight, ...]
    read: Callable[[Weight, str, Region], np.ndarray]
    head: dict[str, np.ndarray] | None = None
    notes: tuple[str, ...] = ()  # for whoever imports it


def names_of(weight: Weight, config: DecoderConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each tensor of a weight: where it goes on our leading axes (layer, then expert), and its name in the files."""
    axes = _axes(weight, config)
    for place in np.ndindex(*axes.values()):
        yield place, weight.name.format(**dict(zip(axes, place, strict=True)))


def _axes(weight: Weight, config: DecoderConfig) -> dict[str, int]:
    axes = {"layer": config.layers, "expert": config.experts}
    return {name: size for name, size in axes.items() if f"{{{name}}}" in weight.name}


class Imported:
    """`Leaves` of a source."""

    def __init__(self, source: Pretrained):
        self._source, self._weights = source, {weight.path: weight for weight in source.weights}
        model = LanguageModel(source.config)
        init = model.init if source.head is None else model.init_scalar
        self.tree = jax.eval_shape(init, jax.random.key(0))
        leaves = jax.tree_util.tree_leaves_with_path(self.tree)
        self.shapes = {self.name(path): tuple(leaf.shape) for path, leaf in leaves}

    def name(self, path: tuple) -> str:
        """A path in `tree` as that of a leaf."""
        return path_name(path).removeprefix("decoder/" if self._source.head else "")

    def blocks(self, path: str, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        """Raises what reading raises."""
        if self._source.head and path.startswith("head/"):
            yield inside(region, region), self._source.head[path.removeprefix("head/")][region]
            return
        weight = self._weights[path]
        axes = _axes(weight, self._source.config)
        for place in itertools.product(*(range(part.start, part.stop) for part in region[: len(axes)])):
            name = weight.name.format(**dict(zip(axes, place, strict=True)))
            for part in by_span(weight, region[len(axes) :], MOST // 4):
                where = (*(slice(i, i + 1) for i in place), *part)
                yield inside(region, where), self._source.read(weight, name, part)[(None,) * len(axes)]

    def check(self) -> None:
        """Nothing is known of what somebody else wrote."""


def load_parameters(source: Pretrained, mesh: jax.sharding.Mesh | None = None, dtype: str = "float32") -> Params:
    """The parameters on the mesh, or in the host's memory without one.

    One parameter at a time, the largest first, each of its shards by itself: what the devices of this process do not
    hold is not read. So the most memory that is needed is little more than the parameters and one shard. Raises what
    reading raises.
    """
    leaves = Imported(source)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    places = jax.tree.map(lambda _: host, leaves.tree) if mesh is None else state_shardings(mesh, leaves.tree)
    layouts = {leaves.name(path): place for path, place in jax.tree_util.tree_leaves_with_path(places)}
    made = {}
    for path in sorted(leaves.shapes, key=lambda path: -math.prod(leaves.shapes[path])):
        made[path] = _placed(leaves, path, layouts[path], dtype)
    return jax.tree.unflatten(jax.tree.structure(leaves.tree), [made[path] for path in leaves.shapes])


def _placed(leaves: Imported, path: str, layout: Sharding, dtype: str) -> jax.Array:
    """One parameter; what several devices hold is read once."""
    shape = leaves.shapes[path]
    held: dict[tuple, list[Any]] = {}
    for device, index in layout.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size) for part, size in zip(index or (), shape, strict=True))
        held.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in held.items():
        shard = read(leaves, path, tuple(slice(first, last) for first, last, _ in bounds), dtype)
        shards += [jax.block_until_ready(jax.device_put(shard, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, layout, shards)
