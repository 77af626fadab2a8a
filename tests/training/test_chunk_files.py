"""Files of arrays: others read them as Zarr, any part of one is what was written, and nothing else is believed."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from tiny import params_of, tiny

from rlhfjax.leaves import empty, shape_of
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.training.checkpoint import Checkpoints, chunks, writing
from rlhfjax.training.checkpoint.chunk_files import reads
from rlhfjax.training.checkpoint.chunks import Layout, layout_of
from rlhfjax.training.checkpoint.writing import Piece, pieces_of, write_pieces
from rlhfjax.training.checkpoint.zarr import described, layout_in

TYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "bool"]


def numbers(shape, dtype):
    drawn = np.random.default_rng(len(shape)).integers(0, 255, (*shape, 4), np.uint8)
    return (drawn[..., 0] > 100) if dtype == "bool" else jnp.asarray(drawn[..., 0] / 16).astype(dtype)


@pytest.mark.parametrize("most", [chunks.MOST, 200])
def test_orbax_and_tensorstore_read_what_is_saved_on_any_mesh(tmp_path, monkeypatch, most):
    # the libraries themselves are asked; fails when chunks are told elsewhere than they lie
    monkeypatch.setattr(chunks, "MOST", most)
    params = params_of(tiny("llama-gqa"))
    mesh = make_mesh(1, 2, 1, 2, devices=jax.devices()[:4])
    placed = jax.device_put(params, state_shardings(mesh, params))
    kinds = {dtype: numbers((4, 6), dtype) for dtype in TYPES}
    training = ((), {"mu": placed, "kinds": kinds}, [None, jnp.int32(7), np.float32(0.5)])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"policy": placed}, training, {"format": 4})
    checkpoints.close()
    with ocp.PyTreeCheckpointer() as reader:
        found = {item: reader.restore(tmp_path / "1" / item) for item in ("policy", "training")}
    assert jax.tree.structure(found["policy"]) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found["policy"], params)
    assert json.loads((tmp_path / "1" / "meta" / "metadata").read_text()) == {"format": 4, "step": 1} | {
        "score": None,
        "metrics": {},
    }
    for got, wanted in zip(jax.tree.leaves(found["training"]), jax.tree.leaves(training), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    place = tmp_path / "1" / "training" / "1.kinds.bfloat16"
    stored = ts.open({"driver": "zarr3", "kvstore": f"file://{place}/"}, read=True).result()
    assert np.asarray(stored.read().result()).tobytes() == np.asarray(kinds["bfloat16"]).tobytes()


def written(folder, array, chunk, file):
    """The folder of an array that lies in files and chunks of given shapes."""
    layout = Layout(array.shape, str(array.dtype), chunk, file)
    region = tuple(slice(0, size) for size in array.shape)
    entries = write_pieces(folder, [Piece("item/x", layout, region, array)])
    for name, entry in entries.items():
        assert (folder / name).stat().st_size == entry["size"]
    return folder / "item" / "x", layout


def read(folder, layout, region, dtype):
    made = empty(shape_of(region), dtype)
    for _, do in reads(folder, layout, region, made):
        do()
    return made


@pytest.mark.parametrize(
    ("chunk", "file"),
    [((1, 2, 3), (1, 4, 6)), ((2, 4, 6), (2, 8, 6)), ((4, 8, 6), (4, 8, 6)), ((1, 8, 6), (4, 8, 6)), ((1, 1, 1),) * 2],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_region_is_read_as_numpy_cuts_it(tmp_path, chunk, file, dtype):
    array = np.random.default_rng(0).standard_normal((4, 8, 6), np.float32)
    folder, layout = written(tmp_path, array, chunk, file)
    assert layout_in(folder) == layout
    for bounds in [
        ((0, 4), (0, 8), (0, 6)),
        ((1, 3), (0, 8), (0, 6)),
        ((3, 4), (5, 7), (1, 6)),
        ((0, 1), (0, 1), (2, 3)),
    ]:
        region = tuple(slice(*axis) for axis in bounds)
        np.testing.assert_array_equal(read(folder, layout, region, dtype), array[region].astype(dtype))


def test_a_file_that_ends_early_is_an_error(tmp_path):
    folder, layout = written(tmp_path, np.arange(24, dtype=np.int32).reshape(4, 6), (2, 6), (4, 6))
    file = folder / "c.0.0"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="expected 96 bytes or more, got 40"):
        read(folder, layout, (slice(0, 4), slice(0, 6)), np.int32)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**9, 10**9]},
        {"shape": [-4, 6]},
        {"shape": [5, 6]},
        {"data_type": "object"},
        {"data_type": "i4,i4"},
        {"codecs": []},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 6]}}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_description_of_another_kind_is_not_believed(tmp_path, change):
    # what a stranger's step says could otherwise make numpy take bytes for objects
    folder, layout = written(tmp_path, np.arange(24, dtype=np.int32).reshape(4, 6), (2, 6), (4, 6))
    (folder / "zarr.json").write_text(json.dumps(json.loads(described(layout)) | change))
    with pytest.raises(ValueError, match="expected"):
        layout_in(folder)


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("blocks/mlp/up/kernel", (12, 640, 1712), (12, 640, 1712)),
        ("blocks/mlp/up/kernel", (80, 8192, 28672), (80, 2048, 7168)),
        ("blocks/attention/query/kernel", (32, 4096, 32, 128), (32, 1024, 8, 128)),
        ("blocks/experts/up/kernel", (24, 32, 2880, 5760), (24, 4, 2880, 5760)),
        ("embed/embedding", (50257, 768), (50257, 192)),
        ("embed/embedding", (32003, 4096), (32003, 512)),  # a prime number of tokens
        ("final_norm/scale", (8192,), (8192,)),
        ("count", (), ()),
        ("empty", (0, 4), (0, 4)),
    ],
)
def test_chunks_and_files_are_of_useful_sizes(name, shape, part):
    layout = layout_of(name, shape, "float32", part)
    for whole, device, file, chunk in zip(shape, part, layout.file, layout.chunk, strict=True):
        assert file % chunk == 0
        assert whole == 0 or (whole % file == 0 and device % file == 0)
    size = 4 * math.prod(shape)
    assert 4 * math.prod(layout.file) <= chunks.MOST
    assert layout.chunk_bytes <= 1.5 * chunks.LARGEST or 32003 in shape  # which no mesh cuts
    assert layout.chunk_bytes >= min(chunks.LEAST / 4, 4 * math.prod(part))
    if size > chunks.MOST and "blocks" in name:
        assert layout.chunk[0] == 1


class Held:
    """An array of which each of three processes holds parts."""

    def __init__(self, shape, parts):
        self.shape, self.dtype, self.parts = shape, np.dtype("float32"), parts


def test_what_several_processes_hold_is_written_once_and_in_turn(monkeypatch):
    tree = {"policy": {str(i): Held((8, 4), {((0, 8), (0, 4)): {0, 1, 2}}) for i in range(6)}}
    tree["policy"]["cut"] = Held((8, 4), {((0, 4), (0, 4)): {0, 1}, ((4, 8), (0, 4)): {2}})
    monkeypatch.setattr(writing.processes, "count", lambda: 3)
    monkeypatch.setattr(writing, "_holders", lambda leaf: leaf.parts)
    monkeypatch.setattr(writing, "_local", lambda leaf: dict.fromkeys(leaf.parts))
    found = []
    for index in range(3):
        monkeypatch.setattr(writing.jax, "process_index", lambda index=index: index)
        found.append([(piece.folder, piece.region) for piece in pieces_of(tree)])
    assert sorted(map(len, found)) == [2, 3, 3]
    together = [piece for pieces in found for piece in pieces]
    assert len({repr(piece) for piece in together}) == len(together) == 8
    assert ("policy/cut", (slice(4, 8), slice(0, 4))) in found[2]


def test_files_of_an_array_are_listed_by_their_names():
    layout = Layout((4, 6), "float32", (1, 3), (2, 3))
    region = (slice(1, 4), slice(0, 2))
    assert [name for name, _ in layout.files(region)] == ["c.0.0", "c.1.0"]
    assert [number for number, _ in layout.chunks_of((slice(0, 2), slice(0, 3)), region)] == [1]
