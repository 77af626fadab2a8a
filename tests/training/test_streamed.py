"""A model that is written a layer at a time: the files of one in memory, and nothing of a model that is broken."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import params_of, scalar_params_of

from rlhfjax.errors import IntegrityError
from rlhfjax.interop.exporting import export_model
from rlhfjax.leaves import InMemory
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.training.checkpoint import chunks, load_model, meta_of, save_leaves, save_model, streamed
from rlhfjax.transfer import import_model

SIZES = {"vocab_size": 304, "layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
QUIET = {"force": False, "report": lambda text: None}


@pytest.mark.parametrize(("role", "made"), [("policy", params_of), ("reward", scalar_params_of)])
@pytest.mark.parametrize("most", [chunks.MOST, 1000])
def test_files_are_those_of_a_model_in_memory(tmp_path, monkeypatch, role, made, most):
    monkeypatch.setattr(chunks, "MOST", most)
    model = LanguageModel(decoder_config("llama", **SIZES))
    params, meta = made(model), meta_of(role, model, None)
    held, written = tmp_path / "held" / "0", tmp_path / "written" / "0"
    save_model(held, role, params, meta)
    save_leaves(written, role, jax.eval_shape(lambda: params), InMemory(params), "float32", meta)

    def arrays(step_dir):
        folders = [path for path in (step_dir / role).iterdir() if path.is_dir() and (path / ".zarray").is_file()]
        files = [path for folder in folders for path in folder.iterdir()]
        return {str(path.relative_to(step_dir)): path.read_bytes() for path in files}

    assert arrays(held) == arrays(written)
    assert len(arrays(held)) >= 2 * len(jax.tree.leaves(params))  # a description and a chunk of each, or more
    described = [json.loads((step_dir / role / "_METADATA").read_text()) for step_dir in (held, written)]
    for leaf in described[0]["tree_metadata"].values():
        del leaf["value_metadata"]["write_shape"]  # of the part that a device had, which nothing reads
    assert described[0] == described[1]
    manifests = [json.loads((place / role / "MANIFEST.sha256.json").read_text()) for place in (held, written)]
    digests = [manifest["arrays"] for manifest in manifests]
    assert digests[0] == digests[1]
    jax.tree.map(np.testing.assert_array_equal, load_model(written)[1], params)


@pytest.fixture
def published(tmp_path):
    """A directory of a model whose layers are most of it, and the bytes of its largest parameter in one layer."""
    model = LanguageModel(decoder_config("llama", **(SIZES | {"layers": 12, "width": 128, "mlp_width": 1536})))
    params = jax.tree.map(lambda leaf: leaf / 8, params_of(model))
    export_model(tmp_path / "source", "policy", model, params, None)
    return tmp_path / "source", params["blocks"]["mlp"]["up"]["kernel"][0].nbytes


def test_an_import_holds_a_layer_of_a_parameter_and_reads_each_once(tmp_path, monkeypatch, published):
    source, layer = published
    monkeypatch.setattr(chunks, "MOST", 1 << 17)
    seen, inner, peaks = [], streamed.read, []

    def reading(leaves, path, region, dtype):
        tracemalloc.reset_peak()
        made = inner(leaves, path, region, dtype)
        seen.append((path, *(part.start for part in region)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        return made

    monkeypatch.setattr(streamed, "read", reading)
    tracemalloc.start()
    import_model(str(source), tmp_path / "made", dtype="float32", **QUIET)
    tracemalloc.stop()
    assert max(peaks) - min(peaks) < 2.5 * layer < 12 * layer  # with what was read of the file
    assert len(set(seen)) == len(seen)
    assert sum(path == "blocks/mlp/up/kernel" for path, *_ in seen) == 12


def test_a_number_that_is_none_ends_it_and_leaves_nothing(tmp_path, published):
    source, _ = published
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"tensor 'model\.layers\.7\.mlp\.up_proj\.weight' with numbers that are"):
        import_model(str(source), tmp_path / "made", dtype="float32", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
