"""Arrays in files as Zarr 3 has them, so that tensorstore, Orbax and whatever else reads Zarr read them, too.

A folder of an item has a folder for each array: `zarr.json` says what it is, and `c.I.J` is a file of whole chunks, one
after the other as they lie in memory, with their places at its end where there are several (`sharding_indexed`). All
chunks are there and none is compressed, so that where each lies follows from its number.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.training.checkpoint.chunks import Layout

DESCRIPTION = "zarr.json"
_MOST_TEXT = 1 << 16  # bytes of a description
_TYPES = {"bool", "bfloat16", "float8_e4m3fn", "float8_e5m2"} | {
    f"{kind}{bits}" for kind, sizes in (("float", (16, 32, 64)), ("int", (8, 16, 32, 64))) for bits in sizes
}
_TYPES |= {f"u{name}" for name in _TYPES if name.startswith("int")}


def name_of(path: str) -> str:
    """The folder of an array by its path in the tree, as Orbax calls it."""
    return path.replace("/", ".")


def described(layout: Layout) -> str:
    """The text of an array's `zarr.json`. Raises ValueError for numbers that have no name there, such as keys."""
    if layout.dtype not in _TYPES:
        raise ValueError(f"expected an array of one of {', '.join(sorted(_TYPES))}, got {layout.dtype[:30]}")
    octets: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs = octets if layout.itemsize > 1 else [{"name": "bytes"}]
    if layout.chunk != layout.file:
        settings = {"chunk_shape": layout.chunk, "codecs": codecs, "index_codecs": octets, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": settings}]
    told = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": layout.shape,
        "data_type": layout.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.file}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if layout.dtype == "bool" else 0,
        "codecs": codecs,
        "attributes": {},
    }
    return json.dumps(told)


def layout_in(folder: Path) -> Layout | None:
    """How the array in a folder is stored; None where that is not as this version writes it, but by Orbax.

    Raises ValueError where its description is not one, OSError where it cannot be read.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(_MOST_TEXT)
    try:
        told = json.loads(text)
        file, codec = told["chunk_grid"]["configuration"]["chunk_shape"], told["codecs"][0]
        chunk = codec["configuration"]["chunk_shape"] if codec["name"] == "sharding_indexed" else file
        layout = Layout(_sizes(told["shape"]), str(told["data_type"]), _sizes(chunk), _sizes(file))
        whole = described(layout) == json.dumps(told) and _fits(layout)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the description of an array, got {error!r}") from None
    if not whole:
        raise ValueError(f"{path}: expected an array as it is written here, got another description")
    return layout


def _sizes(told: Any) -> tuple[int, ...]:
    if not isinstance(told, list) or not all(type(size) is int and size >= 0 for size in told):
        raise ValueError(f"expected sizes of axes, got {str(told)[:60]}")
    return tuple(told)


def _fits(layout: Layout) -> bool:
    parts = zip(layout.shape, layout.file, layout.chunk, strict=True)
    return all(chunk and file and whole % file == 0 and file % chunk == 0 for whole, file, chunk in parts)


def index_of(layout: Layout) -> bytes:
    """What is at the end of each file of several chunks: the place and the bytes of each."""
    if layout.chunk == layout.file:
        return b""
    many, size = math.prod(layout.chunks), layout.chunk_bytes
    places = np.arange(many, dtype="<u8") * size
    return np.stack([places, np.full_like(places, size)], axis=1).tobytes()


def tree_described(tree: Any) -> str:
    """What Orbax wants to know of the tree that an item is, nodes without arrays included."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_empty):
        keys = [_key(entry) for entry in path]
        value = {"value_type": "None" if _is_empty(leaf) else "np.ndarray", "skip_deserialize": _is_empty(leaf)}
        leaves[str(tuple(key["key"] for key in keys))] = {"key_metadata": keys, "value_metadata": value}
    told = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    return json.dumps({"tree_metadata": leaves} | told | {"custom_metadata": None})


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def _key(entry: Any) -> dict[str, Any]:
    """One step of a path of jax: places in sequences are 1, names 2."""
    place = getattr(entry, "idx", None)
    if place is not None:
        return {"key": str(place), "key_type": 1}
    return {"key": str(getattr(entry, "key", getattr(entry, "name", entry))), "key_type": 2}
