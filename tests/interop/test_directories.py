"""Directories that others publish: what is read computes what transformers computes, however the files are cut."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import rlhfjax
from interop.published import golden, publish, save, shard, tensors_of
from rlhfjax.cli import app
from rlhfjax.errors import ConfigError
from rlhfjax.interop.families import config_of
from rlhfjax.interop.huggingface import open_directory
from rlhfjax.interop.pretrained import load_parameters
from rlhfjax.interop.text_parts import text_config
from rlhfjax.models import LanguageModel
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.text.loading import to_huggingface
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import find_checkpoint, read_meta


def imported(source, target, *options):
    result = CliRunner().invoke(app, ["import", str(source), str(target), *options])
    assert result.exit_code == 0, result.output
    return rlhfjax.load(target)


def rows_of(data):
    """The two rows of a golden file, padded on the right."""
    rows = [data["row0"], data["row1"]]
    tokens, mask = np.zeros((2, 12), np.int32), np.zeros((2, 12), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def assert_same_trees(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "llama2", "gemma3"])
def test_what_is_imported_has_the_logits_of_transformers(tmp_path, name):
    # fails when the parts of GPT-2's matrix are swapped, or a layer is put in another place: seen
    data, _ = golden(name)
    model = imported(publish(tmp_path / "published", name), tmp_path / "made" / "model")
    tokens, mask = rows_of(data)
    got = np.asarray(model.logits(tokens, mask))
    for i in range(2):
        np.testing.assert_allclose(got[i][mask[i]], data[f"logits{i}"], atol=1e-4)
    assert (model.role, model.tokenizer) == ("policy", None)


@pytest.mark.parametrize("name", ["gpt2_score", "qwen2_score"])
def test_a_classifier_is_a_reward_model(tmp_path, name):
    data, described = golden(name)
    directory = publish(tmp_path / "published", name, rlhfjax_score_bias=0.75)
    model = imported(directory, tmp_path / "model")
    assert model.role == "reward"
    scores = jax.jit(model.network.scores)(model.params, *rows_of(data))
    np.testing.assert_allclose(scores, data["scores"] + 0.75, atol=1e-4)
    (directory / "config.json").write_text(json.dumps(described | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ConfigError, match="expected a classifier with one label"):
        open_directory(directory)


def test_the_checkpoint_is_laid_out_like_a_stage(tmp_path):
    imported(publish(tmp_path / "gpt", "gpt2"), tmp_path / "model")
    step = find_checkpoint(tmp_path / "model")
    assert step == find_checkpoint(step) == tmp_path / "model" / "checkpoints" / "0"
    meta = read_meta(step)
    assert (meta["role"], meta["serve"], meta["imported"]["name"]) == ("policy", "policy", "gpt")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()} == {0o600}


def test_however_the_files_are_cut_the_parameters_are_the_same(tmp_path):
    tensors = tensors_of(golden("llama3")[1])
    whole = load_parameters(open_directory(publish(tmp_path / "whole", "llama3")))
    assert_same_trees(load_parameters(open_directory(shard(publish(tmp_path / "shards", "llama3")))), whole)
    # as a model without a head saves itself, with buffers of old versions and a copy of the tied matrix
    base = {name.removeprefix("model."): array for name, array in tensors.items()}
    base |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    base |= {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same_trees(load_parameters(open_directory(publish(tmp_path / "base", "llama3", base))), whole)


def test_a_mask_that_old_gpt_2_files_hold_is_no_weight(tmp_path):
    tensors = tensors_of(golden("gpt2")[1])
    more = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 32, 32), np.uint8) for i in range(2)}
    opened = open_directory(publish(tmp_path / "old", "gpt2", tensors | more))
    assert_same_trees(
        load_parameters(opened), load_parameters(open_directory(publish(tmp_path / "new", "gpt2", tensors)))
    )


def test_code_that_a_family_once_needed_is_named_and_not_run(tmp_path):
    # as Phi-3 is published; code under any other name is refused (test_malicious.py)
    classes = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    opened = open_directory(publish(tmp_path / "phi", "phi3", auto_map=classes))
    assert opened.config.family == "phi3"
    assert [note for note in opened.notes if "auto_map" in note and "not run" in note]
    with pytest.raises(ConfigError, match="auto_map"):
        open_directory(publish(tmp_path / "other", "phi3", auto_map=classes | {"AutoModel": "modeling_phi3.Other"}))


@pytest.mark.parametrize("names", [("language_model.model.", ""), ("model.language_model.", "model.")])
def test_of_a_model_with_pictures_the_language_model_is_read_and_the_rest_is_named(tmp_path, names):
    # as transformers 4 and 5 name its parts; the settings that Gemma 3's files leave out are those of its class
    described = golden("gemma3")[1]
    ours, theirs = names
    tensors = {ours + name.removeprefix("model."): array for name, array in tensors_of(described).items()}
    tensors |= {f"{theirs}vision_tower.embeddings.weight": np.ones((2, 2), np.float32)}
    around = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": described, "vision_config": {"a": 1}}
    directory = publish(tmp_path / "pictures", "gemma3", tensors)
    (directory / "config.json").write_text(json.dumps(around))
    opened = open_directory(directory)
    said, no_tokenizer = opened.notes
    assert said == "the language model of Gemma3ForConditionalGeneration alone, without its vision_tower"
    assert "no tokenizer.json" in no_tokenizer  # and not without a word
    assert_same_trees(load_parameters(opened), load_parameters(open_directory(publish(tmp_path / "text", "gemma3"))))
    sparse = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "model_type": "gemma3_text"}
    found = config_of(text_config(around | {"text_config": sparse}))
    assert (found.vocab_size, found.heads, found.kv_heads, found.head_dim, found.context) == (262208, 8, 4, 256, 131072)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_every_float_type_is_read(tmp_path, dtype):
    rounded = {name: array.astype(dtype) for name, array in tensors_of(golden("gpt2")[1]).items()}
    exact = {name: array.astype(np.float32) for name, array in rounded.items()}
    params = load_parameters(open_directory(publish(tmp_path / "rounded", "gpt2", rounded)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert_same_trees(params, load_parameters(open_directory(publish(tmp_path / "exact", "gpt2", exact))))


def test_stored_in_bfloat16_it_is_half_as_large_and_loads_as_float32(tmp_path):
    source = publish(tmp_path / "published", "gpt2")
    model = imported(source, tmp_path / "model", "--dtype", "bfloat16")
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), load_parameters(open_directory(source))
    )
    assert_same_trees(model.params, rounded)


def test_parameters_go_straight_to_their_places_on_a_mesh(tmp_path):
    opened, mesh = open_directory(publish(tmp_path / "llama", "llama2")), make_mesh(2, 2, 1, 2)
    params = load_parameters(opened, mesh)
    assert_same_trees(params, load_parameters(opened))
    wanted = state_shardings(mesh, jax.eval_shape(LanguageModel(opened.config).init, jax.random.key(0)))
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = Tokenizer.train(["the movie was good", "a bad film, and a long one"] * 20, 290)
    tensors = tensors_of(golden("gpt2")[1] | {"vocab_size": 300})  # the model has more rows than there are tokens
    source = publish(tmp_path / "published", "gpt2", tensors, vocab_size=300)
    for name, text in to_huggingface(tokenizer).items():
        (source / name).write_text(text)
    model = imported(source, tmp_path / "model")
    assert model.tokenizer.encode("a good film") == tokenizer.encode("a good film")
    assert len(model.generate(["a good"], max_new_tokens=3)[0][0].tokens) <= 3


def test_what_is_there_is_replaced_by_force_alone(tmp_path):
    gpt, llama = publish(tmp_path / "gpt", "gpt2"), publish(tmp_path / "llama", "llama2")
    imported(gpt, tmp_path / "model")
    result = CliRunner().invoke(app, ["import", str(llama), str(tmp_path / "model")])
    assert (result.exit_code, "exists already" in result.output) == (2, True)
    (llama / "model.safetensors").write_bytes(b"")
    assert CliRunner().invoke(app, ["import", str(llama), str(tmp_path / "model"), "--force"]).exit_code == 4
    assert rlhfjax.load(tmp_path / "model").config.family == "gpt2"
    save(llama / "model.safetensors", tensors_of(golden("llama2")[1]))
    assert imported(llama, tmp_path / "model", "--force").config.family == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt", "llama", "model"]
