"""A checkpoint that is read in blocks: on any way the numbers that were saved, and proven, and never all of them."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, scalar_params_of

from rlhfjax.errors import IntegrityError
from rlhfjax.interop.exporting import export_leaves
from rlhfjax.interop.weight_files import Plan
from rlhfjax.leaves import InMemory, read, region_at
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.layerwise import Layerwise
from rlhfjax.models.lora import init_lora, split
from rlhfjax.sharding import state_shardings
from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.training.checkpoint import Checkpoints, chunks, load_model, meta_of, open_leaves, reference_to, save_model
from rlhfjax.training.checkpoint import leaves as reading

SIZES = {"vocab_size": 304, "layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}


@pytest.fixture(scope="module")
def model():
    return LanguageModel(decoder_config("llama", **SIZES))


def save(folder, item, params, meta, way):
    """As a run does on a mesh of one device or of several, or as an import does."""
    if way == "imported":
        save_model(folder / "0", item, params, meta)
        return folder / "0"
    mesh = make_mesh(1, 2, 1, 2, devices=jax.devices()[:4])
    params = jax.device_put(params, state_shardings(mesh, params)) if way == "mesh" else params
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(0, {item: params}, (jnp.int32(1),), meta)
    checkpoints.close()
    return folder / "0"


def by_layer(leaves, path):
    """All of a parameter, each layer and half of each layer by itself."""
    shape = leaves.shapes[path]
    made = np.full(shape, np.nan, np.float32)
    for place in np.ndindex(*shape[: path.startswith("blocks/")]):
        layer = region_at(shape, place)
        half = [slice(part.start, part.stop) for part in layer]
        if half:
            middle = (half[-1].start + half[-1].stop) // 2
            for part in (slice(half[-1].start, middle), slice(middle, half[-1].stop)):
                made[(*half[:-1], part)] = read(leaves, path, (*half[:-1], part))
        else:
            made[()] = read(leaves, path)
    return made


@pytest.mark.parametrize("way", ["one", "mesh", "imported"])
@pytest.mark.parametrize("chunked", ["by layer", "whole", "whole and large"])
def test_any_part_of_any_checkpoint_is_what_was_saved(tmp_path, model, monkeypatch, way, chunked):
    params = params_of(model)
    if chunked == "by layer":
        monkeypatch.setattr(chunks, "MOST", 1000)
        monkeypatch.setattr(reading, "MOST", 1000)
    if chunked == "whole and large":
        monkeypatch.setattr(reading, "_WHOLE", 1000)
    step_dir = save(tmp_path / "a", "policy", params, meta_of("policy", model, None), way)
    wanted, (_, found) = InMemory(params), open_leaves(step_dir, "policy", tmp_path)
    assert found.shapes.keys() == wanted.shapes.keys()
    for path in wanted.shapes:
        np.testing.assert_array_equal(by_layer(found, path), read(wanted, path))
        np.testing.assert_array_equal(read(found, path), read(wanted, path))
    found.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]  # nothing is left beside it


def test_scalar_models_and_averages_are_read_by_their_item(tmp_path, model):
    params = scalar_params_of(model)
    step_dir = save(tmp_path / "a", "reward", params, meta_of("reward", model, None), "one")
    wanted, (_, found) = InMemory(params), open_leaves(step_dir, "reward", tmp_path)
    assert found.shapes == wanted.shapes
    assert "head/bias" in found.shapes
    for path in wanted.shapes:
        np.testing.assert_array_equal(read(found, path), read(wanted, path))


def test_adapters_are_read_with_their_base(tmp_path, model):
    run, meta = tmp_path / "run", meta_of("policy", model, None)
    base = save(run / "base" / "checkpoints", "policy", params_of(model), meta, "one")
    lora = {"rank": 3, "alpha": 6.0, "targets": ["attention"]}
    adapters = init_lora(jax.random.key(1), params_of(model), 3, ["attention"])
    lineage = {"lora": lora, "base": reference_to(base, run / "sft")}
    meta = meta_of("policy", model, None, **lineage)
    step_dir = save(run / "sft" / "checkpoints", "policy", adapters, meta, "one")
    _, whole = load_model(step_dir)
    assert split(whole)[1]
    wanted, (_, found) = InMemory(whole), open_leaves(step_dir, "policy", tmp_path)
    assert found.shapes.keys() == wanted.shapes.keys()
    for path in wanted.shapes:
        np.testing.assert_array_equal(read(found, path), read(wanted, path))


def test_what_was_read_otherwise_than_it_was_saved_is_named(tmp_path, model, monkeypatch):
    step_dir = save(tmp_path / "a", "policy", params_of(model), meta_of("policy", model, None), "one")
    _, leaves = open_leaves(step_dir, "policy", tmp_path)
    for path in leaves.shapes:
        by_layer(leaves, path)
    leaves.check()
    inner = reading._Stored.blocks

    def wrong(self, region):
        for where, block in inner(self, region):
            block = np.array(block)
            if self.name == "blocks/mlp/up/kernel" and region[0].start == 1:
                block.reshape(-1).view(np.uint32)[-1] ^= 1
            yield where, block

    monkeypatch.setattr(reading._Stored, "blocks", wrong)
    _, leaves = open_leaves(step_dir, "policy", tmp_path)
    for path in leaves.shapes:
        by_layer(leaves, path)
    with pytest.raises(IntegrityError, match="expected policy/blocks/mlp/up/kernel as it was saved, got other bits"):
        leaves.check()


class Peaks:
    """What Python and NumPy held at the end of each call of functions, and the most before that."""

    def __init__(self, monkeypatch):
        self._monkeypatch, self.of = monkeypatch, {}

    def watch(self, owner, name, since_the_last=False):
        """From the start of each call to its end, or from one call to the next."""
        real, found = getattr(owner, name), self.of.setdefault(name, [])

        def watched(*given, **named):
            if not since_the_last:
                tracemalloc.reset_peak()
            made = real(*given, **named)
            found.append(tracemalloc.get_traced_memory())
            tracemalloc.reset_peak()
            return made

        self._monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_a_tensor_and_then_a_layer_but_no_more(tmp_path, monkeypatch, dtype):
    # fails when a stacked parameter or a second layer is in memory: seen
    monkeypatch.setattr(chunks, "MOST", 1 << 17)
    monkeypatch.setattr(reading, "MOST", 1 << 17)
    model = LanguageModel(decoder_config("llama", **(SIZES | {"layers": 12, "width": 128, "mlp_width": 1536})))
    params = jax.tree.map(lambda leaf: leaf / 8, params_of(model))  # or rounding would grow from layer to layer
    step_dir = save(tmp_path / "a", "policy", params, meta_of("policy", model, None), "imported")
    layer = sum(leaf[0].nbytes for leaf in jax.tree.leaves(params["blocks"]))
    stacked = params["blocks"]["mlp"]["up"]["kernel"]
    tensor = stacked[0].nbytes * np.dtype(dtype).itemsize // 4
    del params
    peaks = Peaks(monkeypatch)
    peaks.watch(Plan, "write")
    peaks.watch(Layerwise, "layer", since_the_last=True)
    _, leaves = open_leaves(step_dir, "policy", tmp_path)
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]
    export_leaves(tmp_path / "made", "policy", model, leaves, None, dtype=dtype, shard_size=3_000_000)
    tracemalloc.stop()
    leaves.close()
    assert max(peak for _, peak in peaks.of["write"]) - base < 2 * tensor + 1_000_000 < stacked.nbytes
    compiled, computed = peaks.of["layer"][3:5], peaks.of["layer"][5:]  # a layer is in memory at the end of each
    assert max(peak for _, peak in computed) < compiled[0][0] + 3 * tensor + 100_000
    assert compiled[0][0] - base < layer + 3_000_000 < stacked.nbytes  # with what Python keeps of the programs
