"""Exports: read back they compute the same, plain transformers computes the same, and the card says what they are.

Reading is tested against transformers' numbers in interop/test_directories.py; so is an export that is read back. With
`RLHFJAX_TRANSFORMERS_PYTHON`, an interpreter that has torch and transformers, tests marked `live` load exports there.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, scalar_params_of, tiny
from typer.testing import CliRunner

import rlhfjax
from interop.published import golden, publish, tensors_of
from rlhfjax.api import Model
from rlhfjax.cli import app
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.integrity import MANIFEST
from rlhfjax.interop import exporting
from rlhfjax.interop.exporting import export_model, parse_size
from rlhfjax.interop.huggingface import open_directory
from rlhfjax.interop.pretrained import load_parameters
from rlhfjax.interop.verify_export import sha256
from rlhfjax.models import DecoderConfig, EncoderDecoder, EncoderDecoderConfig, LanguageModel, decoder_config
from rlhfjax.models.rotary import yarn_attention_factor
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer, to_huggingface
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import Checkpoints, meta_of

TEXTS = ["the movie was good", "a bad film, and a long one", "it is good that the film was not long"]
PROMPTS, RESPONSES = ["the movie", "a bad film, and"], [" was good", " a long one"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 20, 300)


def lively(params, std=0.3):
    """Parameters that differ from each other everywhere, biases and scales too."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    moved = [leaf + std * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in moved])


YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 16}
YARN |= {"rope_attention_factor": yarn_attention_factor(4.0)}
STYLES = {
    "gpt2": ("gpt2", {"kv_heads": 4}),
    "llama": ("llama", {}),
    "smollm3": ("smollm3", {"rope_pattern": "RN"}),
    "qwen3_yarn": ("qwen3", YARN),
}


def model_of(style):
    family, own = STYLES[style]
    settings = {"vocab_size": 300, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
    return LanguageModel(decoder_config(family, **(settings | own)))


def exported(target, what, model, params, tokenizer, **settings):
    parity = export_model(target, what, model, params, tokenizer, **settings)
    assert parity == json.loads((target / "parity.json").read_text())
    return parity


def read_back(target):
    opened = open_directory(target)
    return Model(opened.role, LanguageModel(opened.config), load_parameters(opened), opened.tokenizer)


def config_json(target):
    return json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "llama2", "qwen3_yarn", "gemma2", "smollm3"])
def test_an_export_has_the_tensors_that_were_imported(tmp_path, name):
    # bit for bit, and by the names of transformers: the golden directory comes out as it went in
    opened = open_directory(publish(tmp_path / "published", name))
    parity = exported(tmp_path / "made", "policy", LanguageModel(opened.config), load_parameters(opened), None)
    assert parity["max_abs_logit_difference"] == 0
    from safetensors.numpy import load_file

    got, wanted = load_file(tmp_path / "made" / "model.safetensors"), tensors_of(golden(name)[1])
    assert got.keys() == wanted.keys()
    for tensor, array in wanted.items():
        np.testing.assert_array_equal(got[tensor], array)


def test_the_certificate_says_what_was_compared_and_names_every_file(tmp_path, tokenizer):
    model, target = model_of("llama"), tmp_path / "made"
    parity = exported(target, "policy", model, lively(params_of(model)), tokenizer, shard_size=40_000)
    assert parity["max_abs_logit"] > 1
    files = {path.name for path in target.iterdir()}
    assert files - {"README.md", "parity.json", MANIFEST} == parity["sha256"].keys()
    assert all(sha256(target / name) == digest for name, digest in parity["sha256"].items())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= files
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o600}


def test_shards_hold_at_most_their_size_and_read_the_same(tmp_path):
    model = model_of("gpt2")
    params = lively(params_of(model))
    for name, size in (("whole", 10**9), ("shards", 30_000)):
        exported(tmp_path / name, "policy", model, params, None, shard_size=size)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    largest = 300 * 32 * 4
    assert all(path.stat().st_size < max(30_000, largest) + 4_000 for path in shards)
    for name in ("whole", "shards"):
        jax.tree.map(np.testing.assert_array_equal, read_back(tmp_path / name).params, params)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", jnp.bfloat16), ("float16", jnp.float16)])
def test_smaller_types_round_and_say_so(tmp_path, dtype, stored):
    model = model_of("llama")
    params = lively(params_of(model), std=0.1)
    parity = exported(tmp_path / "made", "policy", model, params, None, dtype=dtype)
    rounded = jax.tree.map(lambda leaf: leaf.astype(stored).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, read_back(tmp_path / "made").params, rounded)
    assert 0 < parity["max_abs_logit_difference"] < parity["tolerance"]
    assert config_json(tmp_path / "made")["dtype"] == dtype


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("what", ["reward", "value"])
def test_scores_come_back_with_their_bias(tmp_path, tokenizer, style, what):
    # GPT-2's last norm takes the bias of the head; of Llama it is in config.json
    model, target = model_of(style), tmp_path / "made"
    params = lively(scalar_params_of(model))
    params["head"]["bias"] = jnp.float32(2.5)
    exported(target, what, model, params, tokenizer)
    described, again = config_json(target), read_back(target)
    assert described["architectures"] == [{"gpt2": "GPT2", "llama": "Llama"}[style] + "ForSequenceClassification"]
    assert described["id2label"] == {"0": "score"}
    assert described["pad_token_id"] == tokenizer.pad_id != tokenizer.eos_id
    assert described.get("rlhfjax_score_bias") == (None if style == "gpt2" else 2.5)
    assert float(again.params["head"]["bias"]) == (0 if style == "gpt2" else 2.5)
    wanted = Model(what, model, params, tokenizer).score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(again.score(PROMPTS, RESPONSES), wanted, rtol=1e-5)
    assert "2.5" in (target / "README.md").read_text() or style == "gpt2"


def test_a_norm_after_the_blocks_takes_the_bias_too(tmp_path):
    opened = open_directory(publish(tmp_path / "published", "gpt1"))
    model = LanguageModel(opened.config)
    params = lively(scalar_params_of(model), std=0.1) | {}
    params["head"]["bias"] = jnp.float32(-1.5)
    exported(tmp_path / "made", "reward", model, params, None)
    assert float(read_back(tmp_path / "made").params["head"]["bias"]) == 0
    assert "rlhfjax_score_bias" not in config_json(tmp_path / "made")


def test_padding_is_never_the_end_of_a_text(tmp_path, tokenizer):
    # transformers reads the score before the padding: with EOS for padding it would not read it at the end
    files = to_huggingface(tokenizer)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    described = HuggingFaceTokenizer.load(tmp_path).description
    named = described["named"] | {"pad_token": described["named"]["eos_token"]}
    pads_with_end = HuggingFaceTokenizer(described | {"named": named})
    assert pads_with_end.pad_id == pads_with_end.eos_id
    model = model_of("llama")
    exported(tmp_path / "reward", "reward", model, scalar_params_of(model), pads_with_end)
    exported(tmp_path / "policy", "policy", model, params_of(model), pads_with_end)
    taken = config_json(tmp_path / "reward")["pad_token_id"]
    assert taken not in (*pads_with_end.eos_ids, pads_with_end.bos_id)
    assert load_tokenizer(tmp_path / "reward").pad_id == taken
    assert config_json(tmp_path / "policy")["pad_token_id"] == pads_with_end.eos_id


@pytest.mark.parametrize(("wrong", "said"), [("names", "expected blocks/attention/key"), ("config", "expected logits")])
def test_an_export_that_reads_back_as_something_else_is_not_written(tmp_path, monkeypatch, wrong, said):
    # with tensors under each other's names bits differ, with another constant of rotary positions what is computed
    model, read = model_of("llama"), exporting.open_directory

    def swapped(directory):
        source = read(directory)
        paths = {"blocks/attention/key/kernel": "blocks/attention/value/kernel"}
        paths |= {theirs: ours for ours, theirs in paths.items()}
        if wrong == "config":
            return replace(source, config=replace(source.config, rope_theta=10.0))
        return replace(source, weights=tuple(replace(w, path=paths.get(w.path, w.path)) for w in source.weights))

    monkeypatch.setattr(exporting, "open_directory", swapped)
    with pytest.raises(IntegrityError, match=said + r".* after reading it back, got .* nothing was written"):
        export_model(tmp_path / "made", "policy", model, lively(params_of(model)), None)
    assert list(tmp_path.iterdir()) == []


def test_models_that_transformers_has_not_are_refused(tmp_path):
    model = LanguageModel(replace(model_of("llama").config, activation="gelu"))
    with pytest.raises(ConfigError, match="expected a decoder that transformers has"):
        export_model(tmp_path / "made", "policy", model, params_of(model), None)
    pairs = EncoderDecoder(
        EncoderDecoderConfig(vocab_size=8, layers=1, width=8, heads=2, mlp_width=8, context=8, start_id=1)
    )
    with pytest.raises(ConfigError, match="expected a decoder, got an encoder"):
        export_model(tmp_path / "made", "policy", pairs, {}, None)
    assert isinstance(model.config, DecoderConfig)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("200kB", 200_000), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5TB", "five"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--shard-size: expected a size"):
        parse_size(text)


# From a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run directory with a PPO stage that serves the average of its policy."""
    run, model = tmp_path_factory.mktemp("runs") / "secret_place", model_of("llama")
    stage = run / "ppo"
    average = lively(params_of(model, seed=1))
    checkpoints = Checkpoints(stage / "checkpoints", keep=1)
    meta = meta_of("policy", model, tokenizer, averaged=True)
    value = lively(scalar_params_of(model))
    checkpoints.save(7, {"policy": params_of(model), "average": average, "value": value}, (jnp.int32(7),), meta)
    checkpoints.close()
    (stage / "complete.json").write_text(json.dumps({"stage": "ppo", "step": 7, "eval/reward_score": 1.25}))
    line = {
        "config": {"name": "movies"},
        "config_hash": "c0ffee",
        "seed": 3,
        "data": {"movies/chat@train": "aa11", "/home/somebody/private_client.jsonl@train": "bb22"},
        "argv": ["rlhfjax", "run", "/home/somebody/movies.yaml"],
    }
    (run / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    return run, model, average


def test_what_a_checkpoint_serves_is_exported_with_its_lineage(tmp_path, run):
    directory, _, average = run
    result = CliRunner().invoke(app, ["export", str(directory), str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert "differs by at most 0" in result.output
    jax.tree.map(np.testing.assert_array_equal, read_back(tmp_path / "made").params, average)
    card = (tmp_path / "made" / "README.md").read_text()
    for fact in (
        "ppo",
        "movies",
        "c0ffee",
        "movies/chat@train",
        "aa11",
        "private_client.jsonl@train",
        "1.25",
        "averaged",
    ):
        assert fact in card
    for private in ("somebody", "secret_place", str(directory)):
        assert private not in card + (tmp_path / "made" / "parity.json").read_text()


def test_items_can_be_chosen_and_wrong_ones_are_named(tmp_path, run):
    directory = str(run[0])
    assert CliRunner().invoke(app, ["export", directory, str(tmp_path / "v"), "--item", "value"]).exit_code == 0
    assert config_json(tmp_path / "v")["architectures"] == ["LlamaForSequenceClassification"]
    for options, cause in (
        (["--item", "reward"], "expected one of policy, average, value"),
        (["--dtype", "int8"], "expected float32, bfloat16, float16, got 'int8'"),
        (["--shard-size", "big"], "expected a size such as 5GB"),
    ):
        result = CliRunner().invoke(app, ["export", directory, str(tmp_path / "x"), *options])
        assert (result.exit_code, cause in result.output) == (2, True), result.output
    result = CliRunner().invoke(app, ["export", directory, str(tmp_path / "v")])
    assert (result.exit_code, "exists already" in result.output) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v"]


def test_the_python_interface_exports_what_it_holds(tmp_path, run):
    directory, _, average = run
    rlhfjax.load(directory).export(tmp_path / "made", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, read_back(tmp_path / "made").params, average)
    assert "c0ffee" in (tmp_path / "made" / "README.md").read_text()
    model = tiny("llama")
    Model("policy", model, params_of(model), None).export(tmp_path / "other")
    assert (tmp_path / "other" / "parity.json").exists()


# Against transformers -------------------------------------------------------------------------------------------------

PYTHON = os.environ.get("RLHFJAX_TRANSFORMERS_PYTHON")
SCRIPT = Path(__file__).parents[1] / "golden" / "ask_transformers.py"


def ask(*arguments):
    done = subprocess.run([str(PYTHON), str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.live
@pytest.mark.skipif(not PYTHON, reason="RLHFJAX_TRANSFORMERS_PYTHON names no interpreter")
@pytest.mark.parametrize("style", STYLES)
def test_plain_transformers_computes_the_same(tmp_path, tokenizer, style):
    model = model_of(style)
    policy, scalar = lively(params_of(model)), lively(scalar_params_of(model))
    scalar["head"]["bias"] = jnp.float32(2.5)
    exported(tmp_path / "policy", "policy", model, policy, tokenizer, shard_size=60_000)
    exported(tmp_path / "reward", "reward", model, scalar, tokenizer)
    jax.tree.map(np.testing.assert_array_equal, read_back(tmp_path / "policy").params, policy)
    ours, judge = Model("policy", model, policy, tokenizer), Model("reward", model, scalar, tokenizer)

    theirs = ask("policy", tmp_path / "policy", *PROMPTS)
    for prompt, ids, logits in zip(PROMPTS, theirs["ids"], theirs["logits"], strict=True):
        assert ids == [tokenizer.bos_id, *tokenizer.encode(prompt)]
        np.testing.assert_allclose(ours.logits(np.asarray([ids]))[0], logits, atol=2e-5 * np.abs(logits).max())
    greedy = ours.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
    assert [answer[0].tokens for answer in greedy] == theirs["greedy"]

    texts = [prompt + response + "</s>" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    theirs = ask("reward", tmp_path / "reward", *texts)
    wanted = judge.score(PROMPTS, RESPONSES)
    if style == "gpt2":  # exactly; of Llama up to the constant that config.json has
        np.testing.assert_allclose(theirs["scores"], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(theirs["scores"]) + theirs["bias"], wanted, rtol=1e-4, atol=1e-4)
