"""Arrays in the host's memory: moved where a program reads them, and put back."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax.errors import ConfigError
from rlhfjax.host_memory import DEVICE, HOST, back, on_device, require_host_memory, to_host
from rlhfjax.sharding import make_mesh, state_shapes, state_shardings

X = np.arange(32, dtype=np.float32).reshape(8, 4)


@pytest.fixture(params=[1, 8])
def place(request):
    """A layout on one device, and on eight."""
    mesh = make_mesh(fsdp=-1, data=1, devices=jax.devices()[: request.param])
    return NamedSharding(mesh, PartitionSpec("fsdp"))


def kinds(tree):
    return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


def test_a_round_trip_keeps_bits_and_places(place):
    tree = {"x": jax.device_put(X, place), "count": jnp.int32(3)}
    there = to_host(tree)
    assert kinds(there) == {"x": HOST, "count": HOST}
    here = on_device(there)
    assert kinds(here) == {"x": DEVICE, "count": DEVICE}
    assert here["x"].sharding == place
    np.testing.assert_array_equal(here["x"], X)
    # what lies there already is not copied
    assert on_device(here)["x"] is here["x"]
    assert to_host(there)["x"] is there["x"]


def test_shapes_move_as_arrays_do(place):
    shape = jax.ShapeDtypeStruct(X.shape, jnp.float32, sharding=place)
    assert kinds(to_host(shape)) == HOST
    assert on_device(to_host(shape)).sharding == place


def test_a_program_moves_what_it_reads_and_puts_it_back(place):
    @jax.jit
    def twice(tree):
        return back(jax.tree.map(lambda x: 2 * x, on_device(tree)), tree)

    x = jax.device_put(X, place)
    got = twice({"far": to_host(x), "near": x})
    assert kinds(got) == {"far": HOST, "near": DEVICE}
    for leaf in got.values():
        np.testing.assert_array_equal(leaf, 2 * X)
    with pytest.raises(ValueError, match="memory_space"):  # what is not moved is not computed with
        jax.jit(jnp.add)(to_host(x), x)


def test_moments_and_averages_are_what_is_offloaded(place):
    mesh = place.mesh
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    params = {"embed": {"embedding": shape}}
    state = {"params": params, "optimizer": {"mu": params, "count": number}, "average": params}
    offloaded = state_shardings(mesh, state, offload=True)
    expected = {
        "params": {"embed": {"embedding": DEVICE}},
        "optimizer": {"mu": {"embed": {"embedding": HOST}}, "count": DEVICE},
        "average": {"embed": {"embedding": HOST}},
    }
    assert jax.tree.map(lambda s: s.memory_kind, offloaded) == expected
    assert kinds(state_shapes(mesh, state, offload=True)) == expected
    # laid out once more, they stay where they are
    assert kinds(state_shapes(mesh, state_shapes(mesh, state, offload=True))) == expected
    assert set(jax.tree.leaves(kinds(state_shapes(mesh, state)))) == {DEVICE}


def test_devices_without_such_a_memory_are_refused():
    kinds = [SimpleNamespace(kind="device"), SimpleNamespace(kind="unpinned_host")]
    device = SimpleNamespace(platform="cpu", addressable_memories=lambda: kinds)
    expected = "mesh.offload: expected devices with a memory pinned_host, got cpu with device, unpinned_host; give"
    with pytest.raises(ConfigError, match=expected):
        require_host_memory([device])
    require_host_memory(jax.devices())
