"""A model of somebody else, opened but not read, and its parameters laid out one at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from rlhfjax.interop.families import Weight
from rlhfjax.models import DecoderConfig, LanguageModel
from rlhfjax.sharding import state_shardings
from rlhfjax.sharding.rules import path_name
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.types import Params


@dataclass(frozen=True)
class Pretrained:
    """What a source says of its model, and how to read it.

    `read(weight, name)` gives one tensor in the shape that `weight` has in the files, in any float type; `name` is
    `weight.name` with the numbers of layer and expert in it. A scalar model (`role` "reward") has a `head` beside.
    """

    config: DecoderConfig
    role: str
    tokenizer: AnyTokenizer | None
    weights: tuple[Weight, ...]
    read: Callable[[Weight, str], np.ndarray]
    head: dict[str, np.ndarray] | None = None
    notes: tuple[str, ...] = ()  # for whoever imports it


def names_of(weight: Weight, config: DecoderConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each tensor of a weight: where it goes on our leading axes (layer, then expert), and its name in the files."""
    axes = {"layer": config.layers, "expert": config.experts}
    axes = {name: size for name, size in axes.items() if f"{{{name}}}" in weight.name}
    for place in np.ndindex(*axes.values()):
        yield place, weight.name.format(**dict(zip(axes, place, strict=True)))


def load_parameters(source: Pretrained, mesh: jax.sharding.Mesh | None = None, dtype: str = "float32") -> Params:
    """The parameters on the mesh, or in the host's memory without one.

    One parameter at a time, the largest first, is put together on the host (all its layers) and placed; so the most
    memory that is needed is little more than the model itself. Raises what reading raises.
    """
    model = LanguageModel(source.config)
    shapes = jax.eval_shape(model.init if source.head is None else model.init_scalar, jax.random.key(0))
    if mesh is None:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        places = jax.tree.map(lambda _: host, shapes)
    else:
        places = state_shardings(mesh, shapes)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    targets = {path_name(path).removeprefix("decoder/" if source.head else ""): leaf.shape for path, leaf in leaves}
    weights = {weight.path: weight for weight in source.weights}
    made = {}
    for name in sorted(targets, key=lambda name: -math.prod(targets[name])):
        if source.head and name.startswith("head/"):
            buffer = source.head[name.removeprefix("head/")].astype(dtype)
        else:
            buffer = _stacked(source, weights[name], targets[name], dtype)
        made[name] = buffer
        place = jax.tree.leaves(places)[list(targets).index(name)]
        made[name] = jax.block_until_ready(jax.device_put(buffer, place))
        del buffer
    return jax.tree.unflatten(structure, [made[name] for name in targets])


def _stacked(source: Pretrained, weight: Weight, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    buffer = np.empty(shape, dtype)
    for place, name in names_of(weight, source.config):
        buffer[place] = weight.look(source.read(weight, name))
    return buffer
