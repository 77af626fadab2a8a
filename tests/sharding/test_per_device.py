"""Attention over the axis `sequence`: each device does its share and holds its share, by the compiled program."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax.planning.hlo import Program
from rlhfjax.sharding import make_mesh
from rlhfjax.sharding.activations import layout_of

ROWS, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 64, 8, 2, 32
MESHES = [
    {"sequence": 2},
    {"data": 2, "sequence": 4},  # two devices for a key head
    {"sequence": 2, "tensor": 2, "data": 2},
    {"sequence": 8},
    {"sequence": 4, "tensor": 2},
    {"tensor": 8},  # four devices for a key head
]
pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")


def plain(query, key, value, segments, slots=None):
    """Attention as it stands, of queries that may be anywhere."""
    slots = jnp.arange(query.shape[1]) if slots is None else slots
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key)
    seen = segments[:, slots, None] == segments[:, None, :]
    seen &= (slots[:, None] >= jnp.arange(key.shape[1])[None, :])[None]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30)), value)


def compiled(axes, kernel, heads=HEADS, key_heads=KEY_HEADS):
    """Forward and backward of it on a mesh, where tokens lie over `sequence` and heads over `tensor`."""
    mesh = make_mesh(**{"data": 1} | axes, devices=jax.devices()[: math.prod(axes.values())])
    spec = PartitionSpec(("data", "fsdp", "expert"), "sequence", "tensor")

    def shapes(count):
        split = spec if count % mesh.shape["tensor"] == 0 else PartitionSpec(*spec[:2])
        return jax.ShapeDtypeStruct((ROWS, LENGTH, count, SIZE), jnp.float32, sharding=NamedSharding(mesh, split))

    query, key = shapes(heads), shapes(key_heads)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(*spec[:2])))
    layout = layout_of(mesh)
    program = plain if layout is None else layout.attention(plain, kernel)

    def gradients(query, key, value, segments, taught):
        return jax.vjp(lambda *qkv: program(*qkv, segments), query, key, value)[1](taught)

    return Program(jax.jit(gradients).lower(query, key, key, ids, query).compile().as_text())


def arrays(program):
    return [shape for lines in program.computations.values() for one in lines for kind, shape in one.shapes]


# fails where tokens are gathered and all heads computed by each: seen
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("axes", MESHES)
def test_a_device_computes_and_holds_its_share(axes, kernel):
    one, spread = compiled({"data": 1}, kernel), compiled(axes, kernel)
    devices = math.prod(axes.values())
    assert spread.walked().total("flops") == one.walked().total("flops") / devices
    most = ROWS * HEADS * LENGTH * max(LENGTH, SIZE) // devices
    assert max(math.prod(shape) for shape in arrays(spread)) == most  # scores of its heads
    held = [shape for shape in arrays(spread) if len(shape) == 4 and SIZE in shape and LENGTH in shape]
    assert held
    if kernel:  # keys and values, as one array, of all tokens and of the heads that its queries ask
        asked = max(HEADS, 2 * math.lcm(KEY_HEADS, axes.get("sequence", 1) * axes.get("tensor", 1)))
        assert max(math.prod(shape) for shape in held) <= ROWS * LENGTH * SIZE * asked // devices


# fails where they gather queries as well: seen
@pytest.mark.parametrize("axes", [{"sequence": 4, "tensor": 2}, {"sequence": 8}])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_devices_of_one_head_share_its_queries(axes, heads, key_heads):
    one, spread = (compiled(mesh, True, heads, key_heads) for mesh in ({"data": 1}, axes))
    assert spread.walked().total("flops") == one.walked().total("flops") / 8
