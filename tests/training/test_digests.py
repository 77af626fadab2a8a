"""Digests of arrays: of their bits and places alone, whatever holds them."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax.sharding import make_mesh
from rlhfjax.training import digests
from rlhfjax.training.digests import different_leaves, fetched, leaf_digests, started

RNG = np.random.default_rng(0)
ARRAY = RNG.normal(size=(8, 4, 6)).astype(np.float32)


def brute_force(words):
    """The digest in plain Python: MurmurHash3's finalizer of each word and its place, added up."""

    def mixed(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    seeds = (0x9E3779B9, 0x7F4A7C15)
    sums = [sum(mixed(word ^ mixed((i + seed) % 2**32)) for i, word in enumerate(words)) % 2**32 for seed in seeds]
    return "".join(f"{value:08x}" for value in sums)


def on_devices(leaf):
    """The two sums of one leaf as a program finds them, which CPUs of one process have no need of."""
    [sums] = digests._on_devices([leaf], (str(leaf.dtype),))
    return sums


def test_a_loop_over_the_words_gives_the_same():
    words = struct.unpack(f"<{ARRAY.size}I", ARRAY.tobytes())
    assert leaf_digests({"a": {"b": jnp.asarray(ARRAY)}}) == {"a/b": f"float32[8,4,6]:{brute_force(words)}"}
    small = jnp.asarray(ARRAY, jnp.bfloat16)
    words = struct.unpack(f"<{ARRAY.size}H", np.asarray(small).tobytes())
    assert leaf_digests([small]) == {"0": f"bfloat16[8,4,6]:{brute_force(words)}"}
    assert leaf_digests({"n": jnp.int32(7)}) == {"n": f"int32[]:{brute_force([7])}"}
    assert leaf_digests({"m": jnp.asarray([True, False])}) == {"m": f"bool[2]:{brute_force([1, 0])}"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_any_layout_on_any_mesh_gives_the_same(dtype):
    # meant to fail when a place is counted within a shard
    array = np.asarray(ARRAY > 0) if dtype == "bool" else np.asarray(jnp.asarray(ARRAY * 9).astype(dtype))
    wanted = leaf_digests({"a": array})
    mesh = make_mesh(2, 2, 1, 2)
    for spec in ((), ("data",), (None, "fsdp"), (("data", "fsdp"), None, "tensor"), ("tensor", "data", "fsdp")):
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert leaf_digests({"a": placed}) == wanted
        assert np.array_equal(on_devices(placed), digests._on_host(array, dtype))
    single = jax.device_put(array, jax.devices()[3])
    assert np.array_equal(on_devices(single), digests._on_host(array, dtype))


def test_arrays_longer_than_what_the_host_mixes_at_a_time():
    long = RNG.normal(size=3 * digests._CHUNK + 5).astype(np.float32)
    assert np.array_equal(on_devices(jnp.asarray(long)), digests._on_host(long, "float32"))


def test_blocks_of_every_size_are_added_up(monkeypatch):
    # fails when a block begins where the one before began: seen
    long = RNG.normal(size=(3, 9, 1 << 9)).astype(np.float32)
    wanted = digests._on_host(long, "float32")
    monkeypatch.setattr(digests, "_BLOCKS", (1 << 12, 1 << 10))
    assert digests._on_host(long, "float32") == digests._on_host(long.reshape(-1), "float32") == wanted


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_digests_are_of_what_was_there_when_they_began():
    # fails when arrays themselves are kept and not their memory, and when those of NumPy are read later: seen
    split = NamedSharding(make_mesh(2, 2, 1, 2), PartitionSpec("data", None, "tensor"))
    tree = {"one": jax.jit(jnp.negative)(ARRAY), "split": jax.jit(jnp.negative, out_shardings=split)(ARRAY)}
    tree |= {"keys": jax.random.split(jax.random.key(3), 4), "numpy": ARRAY.copy()}
    wanted, pending = leaf_digests(tree), started(tree)
    for name in ("one", "split"):
        tree[name] = jax.block_until_ready(jax.jit(lambda leaf: leaf * 0, donate_argnums=0)(tree[name]))
    tree["numpy"][:] = 0
    assert fetched(pending) == wanted


def test_keys_have_digests_too():
    keys = jax.random.split(jax.random.key(3), 4)
    [text] = leaf_digests([keys]).values()
    words = np.asarray(jax.random.key_data(keys)).reshape(-1).tolist()
    assert text.endswith(brute_force(words))
    assert np.array_equal(on_devices(keys), digests._on_host(keys, str(keys.dtype)))


def test_every_single_bit_counts():
    small = ARRAY[0]
    wanted = leaf_digests({"a": small})
    for bit in range(8 * small.nbytes):
        data = bytearray(small.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        assert leaf_digests({"a": np.frombuffer(data, np.float32).reshape(small.shape)}) != wanted


def test_elements_and_leaves_that_trade_places():
    # a sum of bits times a hash does not notice x and -x: seen with one
    a, b = ARRAY[0], ARRAY[1]
    wanted = leaf_digests({"a": a, "b": b})
    assert leaf_digests({"a": b, "b": a}) != wanted
    assert leaf_digests({"a": a.T.copy()})["a"][-16:] != wanted["a"][-16:]
    opposite = np.asarray([1.5, -1.5], np.float32)
    assert leaf_digests([opposite]) != leaf_digests([opposite[::-1].copy()])
    for i in range(a.size - 1):
        swapped = a.copy().reshape(-1)
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        assert leaf_digests({"a": swapped.reshape(a.shape), "b": b})["a"] != wanted["a"]
    assert leaf_digests([a.reshape(-1)])["0"][-16:] == wanted["a"][-16:]  # the shape is said beside it


def test_what_differs_is_named():
    tree = {"a": jnp.asarray(ARRAY), "b": {"c": jnp.int32(3)}}
    stored = leaf_digests(tree)
    assert different_leaves(tree, stored) == []
    assert different_leaves({"a": tree["a"], "b": {"c": jnp.int32(4)}}, stored) == ["b/c"]
    assert different_leaves({"a": tree["a"]}, stored) == ["b/c"]
    assert different_leaves(tree | {"d": jnp.int32(0)}, stored) == ["d"]


def test_what_was_read_in_a_wider_type_is_compared_in_the_stored_one():
    stored = leaf_digests({"a": jnp.asarray(ARRAY, jnp.bfloat16)})
    wide = jnp.asarray(ARRAY, jnp.bfloat16).astype(jnp.float32)
    assert different_leaves({"a": wide}, stored) == []
    assert different_leaves({"a": wide * 2}, stored) == ["a"]
    narrow = leaf_digests({"a": jnp.asarray(ARRAY)})
    assert different_leaves({"a": wide.astype(jnp.bfloat16)}, narrow) == []  # cannot be compared
