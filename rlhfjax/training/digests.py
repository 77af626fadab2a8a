"""Digests of arrays that depend on their bits and places alone, not on how they lie on devices.

An element's bits are mixed with a hash of its place in the whole array, and the results are added modulo 2^32. Integer
addition is associative, so any layout on any mesh gives the same number, and a restore onto another mesh can be proven.
A mere sum of bits times hash would not notice x and -x trading places; the mixing is a bijection of the bits, so that
a single changed element always shows.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

_SEEDS = (0x9E3779B9, 0x7F4A7C15)  # two sums, 64 bits together
_WIDER = {"bfloat16": "float32", "float16": "float32"}  # what loading may make of a stored type without loss

_CHUNK = 1 << 16  # elements that the host mixes at a time: they stay in its cache

Pending = dict[str, tuple[str, Any]]


def leaf_digests(tree: Any) -> dict[str, str]:
    """`dtype[shape]:16 hex digits` of every array, by its path in the tree; computed on the devices that hold it."""
    return fetched(started(tree))


def started(tree: Any) -> Pending:
    """`leaf_digests` under way: what `fetched` waits for. The arrays may be donated to another program at once."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): (_described(leaf), _sums(leaf, str(leaf.dtype))) for path, leaf in leaves}


def fetched(pending: Pending) -> dict[str, str]:
    """The digests that were started, as text."""
    sums = jax.device_get({path: value for path, (_, value) in pending.items()})
    return {path: f"{what}:{sums[path][0]:08x}{sums[path][1]:08x}" for path, (what, _) in pending.items()}


def different_leaves(tree: Any, stored: Mapping[str, str]) -> list[str]:
    """Paths at which `tree` is not what `stored` says, missing ones on either side among them.

    Leaves that were read in a wider type than they are stored in are compared in the stored one; those in a narrower
    type cannot be.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    wanted = {path: text.partition("[")[0] for path, text in stored.items()}
    same = [path for path in leaves if path in stored and _comparable(leaves[path], wanted[path])]
    pending = {path: (_described(leaves[path], wanted[path]), _sums(leaves[path], wanted[path])) for path in same}
    found = fetched(pending)
    return sorted(leaves.keys() ^ stored.keys()) + sorted(path for path in same if found[path] != stored[path])


def leaf_name(path: Any) -> str:
    """A path in a tree as text, such as `decoder/embed/embedding`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _described(leaf: Any, dtype: str | None = None) -> str:
    return f"{dtype or leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _comparable(leaf: Any, stored: str) -> bool:
    return str(leaf.dtype) in (stored, _WIDER.get(stored))


def _sums(leaf: Any, dtype: str) -> Any:
    """The two sums of a leaf. On CPUs NumPy is as fast as a program of XLA, and needs none compiled."""
    if not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu"):
        return _on_host(leaf, dtype)
    return _on_devices(leaf, dtype)


def _on_devices(leaf: jax.Array, dtype: str) -> jax.Array:
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return _jitted(mesh)(leaf, dtype)


def _jitted(mesh: Any):
    if mesh not in _compiled:
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        _compiled[mesh] = jax.jit(_digest, static_argnums=1, out_shardings=everywhere)
    return _compiled[mesh]


_compiled: dict[Any, Any] = {}


def _digest(leaf: jax.Array, dtype: str) -> UInt32[Array, "2"]:
    bits = _bits(leaf if str(leaf.dtype) == dtype else leaf.astype(dtype))
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.stack([_mixed(bits ^ _mixed(place + jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in _SEEDS])


def _on_host(leaf: Any, dtype: str) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    array = np.ascontiguousarray(array if str(array.dtype) == dtype or "key" in dtype else array.astype(dtype))
    bits = array.reshape(-1).view(f"u{min(array.dtype.itemsize, 4)}")
    sums = np.zeros(2, np.uint64)
    for start in range(0, bits.size, _CHUNK):
        some = bits[start : start + _CHUNK].astype(np.uint32)
        place = np.arange(start, start + some.size).astype(np.uint32)
        for lane, seed in enumerate(_SEEDS):
            sums[lane] += _mixed(some ^ _mixed(place + np.uint32(seed))).sum(dtype=np.uint64)
    return sums.astype(np.uint32)  # modulo 2^32


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
