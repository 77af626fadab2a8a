"""Digests of arrays that depend on their bits and places alone, not on how they lie on devices.

An element's bits are mixed with a hash of its place in the whole array, and the results are added modulo 2^32. Integer
addition is associative, so any layout on any mesh gives the same number, and a restore onto another mesh can be proven.
A mere sum of bits times hash would not notice x and -x trading places; the mixing is a bijection of the bits, so that
a single changed element always shows.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from rlhfjax.host_memory import on_device

_SEEDS = (0x9E3779B9, 0x7F4A7C15)  # two sums, 64 bits together
_WIDER = {"bfloat16": "float32", "float16": "float32"}  # what loading may make of a stored type without loss

_CHUNK = 1 << 15  # elements that the host mixes at a time: they stay in its cache
_BLOCKS = (1 << 20, 1 << 18)  # elements of a block that XLA mixes on a CPU; to begin with one takes a quarter of a ms
_WORKERS = min(2, os.cpu_count() or 1)
Held = list[tuple[np.ndarray, Any]]  # parts of an array where they lie, and where they begin in it


class Pending(NamedTuple):
    """Digests under way: what each leaf is by its path, the sums that are there, what the host holds, and programs.

    What is held of a jax array no program takes over: a donated one is copied.
    """

    described: dict[str, str]
    found: dict[str, tuple[int, int]]
    held: dict[str, tuple[Held, str, tuple[int, ...]]]
    computed: list[tuple[list[str], UInt32[Array, "leaves 2"]]]


def leaf_digests(tree: Any) -> dict[str, str]:
    """`dtype[shape]:16 hex digits` of every array, by its path in the tree; computed on the devices that hold it."""
    return fetched(started(tree))


def started(tree: Any) -> Pending:
    """`leaf_digests` under way: what `fetched` waits for. The arrays may be donated to another program at once."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return _started(leaves, {path: str(leaf.dtype) for path, leaf in leaves.items()})


def fetched(pending: Pending) -> dict[str, str]:
    """The digests that were started, as text; once."""
    sums: dict[str, Any] = dict(pending.found)
    with ThreadPoolExecutor(_WORKERS) as pool:
        sums |= zip(pending.held, pool.map(lambda held: _sums_of_parts(*held), pending.held.values()), strict=True)
    pending.held.clear()  # the memory may go
    for paths, computed in pending.computed:
        sums |= zip(paths, jax.device_get(computed), strict=True)
    return {path: f"{what}:{sums[path][0]:08x}{sums[path][1]:08x}" for path, what in pending.described.items()}


def different_leaves(tree: Any, stored: Mapping[str, str], known: Mapping[str, str] | None = None) -> list[str]:
    """Paths at which `tree` is not what `stored` says, missing ones on either side among them.

    Leaves that were read in a wider type than they are stored in are compared in the stored one; those in a narrower
    type cannot be. What is `known` are digests that `digest_here` gave.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    wanted = {path: text.partition("[")[0] for path, text in stored.items()}
    same = [path for path in leaves if path in stored and _comparable(leaves[path], wanted[path])]
    found = dict(known or {})
    found |= fetched(_started({path: leaves[path] for path in same if path not in found}, wanted))
    return sorted(leaves.keys() ^ stored.keys()) + sorted(path for path in same if found[path] != stored[path])


def digest_here(leaf: Any, stored: str) -> str | None:
    """The digest of an array to compare with a stored one; None where devices are to find it, or nothing can."""
    dtype = stored.partition("[")[0]
    if not _held_by_host(leaf) or not _comparable(leaf, dtype):
        return None
    first, second = _on_host(leaf, dtype)
    return f"{_described(leaf, dtype)}:{first:08x}{second:08x}"


def leaf_name(path: Any) -> str:
    """A path in a tree as text, such as `decoder/embed/embedding`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _described(leaf: Any, dtype: str | None = None) -> str:
    return f"{dtype or leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _comparable(leaf: Any, stored: str) -> bool:
    return str(leaf.dtype) in (stored, _WIDER.get(stored))


def _started(leaves: Mapping[str, Any], dtypes: Mapping[str, str]) -> Pending:
    """The sums of all leaves, each in a type: one program for those that lie on the same devices.

    A program a leaf would be two hundred collectives in flight. Those of CPU devices each hold a thread while they wait
    for other processes, and two processes that spent their threads on different ones would wait for ever.
    """
    described = {path: _described(leaf, dtypes[path]) for path, leaf in leaves.items()}
    here = {path: leaf for path, leaf in leaves.items() if _held_by_host(leaf)}
    changeable = {path: leaf for path, leaf in here.items() if not isinstance(leaf, jax.Array)}
    found = {path: _on_host(leaf, dtypes[path]) for path, leaf in changeable.items()}
    held = {path: _held(leaf, dtypes[path]) for path, leaf in here.items() if path not in found}
    computed = []
    for paths in _by_devices({path: leaf for path, leaf in leaves.items() if path not in here}):
        computed.append((paths, _on_devices([leaves[path] for path in paths], tuple(dtypes[path] for path in paths))))
    return Pending(described, found, held, computed)


def _held_by_host(leaf: Any) -> bool:
    """On CPUs NumPy is as fast as a program of XLA, and needs none compiled."""
    return not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and _a_device(leaf).platform == "cpu")


def _a_device(leaf: jax.Array) -> Any:
    return next(iter(leaf.devices()))


def _by_devices(leaves: Mapping[str, jax.Array]) -> list[list[str]]:
    """Paths of leaves that one program can read, in their order: it is the same in all processes."""
    groups: dict[Any, list[str]] = {}
    for path, leaf in leaves.items():
        groups.setdefault(_mesh_of(leaf) or frozenset(leaf.devices()), []).append(path)
    return list(groups.values())


def _mesh_of(leaf: jax.Array) -> Any:
    return leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None


def _on_devices(leaves: Sequence[jax.Array], dtypes: tuple[str, ...]) -> UInt32[Array, "leaves 2"]:
    return program_on(_mesh_of(leaves[0]))(tuple(leaves), dtypes)


def program_on(mesh: jax.sharding.Mesh | None) -> Any:
    """The jitted function of (leaves, their types in text) that finds digests on the devices of a mesh."""
    if mesh not in _compiled:
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        _compiled[mesh] = jax.jit(_digests, static_argnums=1, out_shardings=everywhere)
    return _compiled[mesh]


_compiled: dict[Any, Any] = {}


def _digests(leaves: tuple[jax.Array, ...], dtypes: tuple[str, ...]) -> UInt32[Array, "leaves 2"]:
    return jnp.stack([_digest(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)])


def _digest(leaf: jax.Array, dtype: str) -> UInt32[Array, "2"]:
    leaf = on_device(leaf)
    bits = _bits(leaf if str(leaf.dtype) == dtype else leaf.astype(dtype))
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.stack([_mixed(bits ^ _mixed(place + jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in _SEEDS])


@dataclass
class Sums:
    """The digest of an array that is read in blocks: how many elements there were, and both sums so far."""

    count: int = 0
    first: int = 0
    second: int = 0

    def add(self, block: np.ndarray, shape: Sequence[int], start: Sequence[int]) -> None:
        """Count a block of numbers of an array of `shape`, which begins at `start` in it."""
        if block.ndim > 1 and block.shape[1:] == tuple(shape[1:]):  # it lies in one piece there
            block, start, shape = block.reshape(-1), [start[0] * math.prod(shape[1:])], [math.prod(shape)]
        bits = np.ascontiguousarray(block).reshape(-1, max(block.shape[-1], 1) if block.ndim else 1)
        bits = bits.view(f"u{min(block.dtype.itemsize, 4)}")
        each = bits.shape[1] // max(block.shape[-1] if block.ndim else 1, 1)
        strides = [math.prod(shape[axis + 1 :]) * each for axis in range(len(shape))]
        rows = np.zeros((1,) * max(block.ndim - 1, 0), np.uint64)  # where each row of the block begins
        for axis in range(block.ndim - 1):
            steps = (start[axis] + np.arange(block.shape[axis], dtype=np.uint64)) * np.uint64(strides[axis])
            rows = rows + steps.reshape((-1,) + (1,) * (block.ndim - 2 - axis))
        first = (start[-1] if block.ndim else 0) * each
        sums = _sums_of_rows(bits, (rows.reshape(-1) + np.uint64(first)).astype(np.uint32))
        self.count += block.size
        self.first, self.second = ((old + int(new)) % 2**32 for old, new in zip(self.pair, sums, strict=True))

    @property
    def pair(self) -> tuple[int, int]:
        return self.first, self.second

    def __add__(self, other: "Sums") -> "Sums":
        first, second = ((one + two) % 2**32 for one, two in zip(self.pair, other.pair, strict=True))
        return Sums(self.count + other.count, first, second)

    def text(self, dtype: str, shape: Sequence[int]) -> str:
        """What `leaf_digests` gives."""
        return f"{dtype}[{','.join(map(str, shape))}]:{self.first:08x}{self.second:08x}"


def _on_host(leaf: Any, dtype: str) -> tuple[int, int]:
    """The sums of an array that the host has, each part where it lies."""
    return _sums_of_parts(*_held(leaf, dtype))


def _held(leaf: Any, dtype: str) -> tuple[Held, str, tuple[int, ...]]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    parts = [(np.asarray(leaf), (slice(0, None),) * leaf.ndim)] if _whole_here(leaf) else _parts(leaf)
    return parts, dtype, tuple(leaf.shape)


def _sums_of_parts(parts: Held, dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    sums = Sums()
    for array, index in parts:
        array = array if str(array.dtype) == dtype or "key" in dtype else array.astype(dtype)
        sums.add(array, shape, [part.start or 0 for part in index])
    return sums.pair


def _whole_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_replicated


def _parts(leaf: jax.Array) -> Held:
    return [(np.asarray(shard.data), shard.index) for shard in leaf.addressable_shards if shard.replica_id == 0]


def _sums_of_rows(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Both sums of rows of elements, of which each begins at a place in the whole array; not yet modulo 2^32."""
    sums, width = np.zeros(2, np.uint64), math.gcd(bits.shape[1], 1024)
    least = _BLOCKS[-1]
    if len(bits) == 1 and bits.size >= least:  # the end that fills no block is left
        head = bits.size // least * least
        sums += _sums_of_rows(bits[0, :head].reshape(-1, 1024), _starts(rows, head, 1024))
        bits, rows = bits[:, head:], (rows + np.uint32(head % 2**32)).astype(np.uint32)
    elif width >= 128 and bits.size >= least and (device := _cpu()):
        pieces, places, done = bits.reshape(-1, width), _starts(rows, bits.shape[1], width), 0
        for many in (size // width for size in _BLOCKS):
            while done + many <= len(pieces):
                block = jax.device_put((pieces[done : done + many], places[done : done + many]), device)
                sums += np.asarray(_columns(*block)).sum(axis=1, dtype=np.uint64)
                done += many
        bits, rows = pieces[done:], places[done:]
    many = max(_CHUNK // max(bits.shape[1], 1), 1)
    for i in range(0, len(bits), many):
        for j in range(0, bits.shape[1], _CHUNK):
            columns = np.arange(j, min(j + _CHUNK, bits.shape[1]), dtype=np.uint32)
            sums += _sums(bits[i : i + many, j : j + _CHUNK], rows[i : i + many, None] + columns)
    return sums


def _starts(rows: np.ndarray, length: int, width: int) -> np.ndarray:
    """Where each piece of a width begins, of rows of a length that begin at places."""
    return (rows[:, None] + np.arange(0, length, width, dtype=np.uint64).astype(np.uint32)).reshape(-1)


@cache
def _cpu() -> Any:
    """A CPU that XLA computes with; None where jax was told to use other devices alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@jax.jit
def _columns(bits: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums of columns: XLA makes vectors of these, and not of a sum of all."""
    place = rows[:, None] + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 1)
    mixed = [_mixed(bits.astype(jnp.uint32) ^ _mixed(place + jnp.uint32(seed))) for seed in _SEEDS]
    return jnp.stack([lane.sum(axis=0, dtype=jnp.uint32) for lane in mixed])


def _sums(bits: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Both sums of some elements, not yet modulo 2^32."""
    bits = bits.astype(np.uint32)
    lanes = (_mixed(bits ^ _mixed(place + np.uint32(seed))) for seed in _SEEDS)
    return np.array([lane.sum(dtype=np.uint64) for lane in lanes], np.uint64)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each element as uint32; of eight bytes as two."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    size = leaf.dtype.itemsize
    as_unsigned = partial(jax.lax.bitcast_convert_type, leaf)
    if size == 8:
        return as_unsigned(jnp.uint32)
    return as_unsigned({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]).astype(jnp.uint32)


def _mixed(x: Any) -> Any:
    """The finalizer of MurmurHash3, a bijection of 32 bits in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
