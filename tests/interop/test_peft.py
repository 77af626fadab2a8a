"""Adapters against PEFT's own file of the same adapters, and against its logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import stored

from rlhfjax.errors import ConfigError
from rlhfjax.interop.exporting import export_model
from rlhfjax.interop.families import config_of, weights
from rlhfjax.interop.peft import SETTINGS, TENSORS, export_adapters
from rlhfjax.interop.pretrained import names_of
from rlhfjax.interop.safetensors_files import read_header, read_tensor
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.lora import init_lora, join, split

GOLDEN = Path(__file__).parents[1] / "golden" / "peft.npz"
OURS = {"self_attn.q_proj": "query", "self_attn.o_proj": "out", "self_attn.v_proj": "value", "mlp.down_proj": "down"}
# Where torch and peft are installed apart from this package, the live test asks that Python.
PYTHON = os.environ.get("PYTHON_WITH_PEFT", sys.executable)


@pytest.fixture(scope="module")
def golden():
    return stored(GOLDEN)


@pytest.fixture(scope="module")
def adapted(golden):
    """The model of the golden file in our layout, adapters and all."""
    settings = json.loads(str(golden["settings"]))
    model = LanguageModel(config_of(json.loads(str(golden["config"]))))
    model = LanguageModel(type(model.config)(**vars(model.config) | {"lora_alpha": settings["lora_alpha"]}))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    for weight in weights(model.config):
        for place, name in names_of(weight, model.config):
            leaf = params
            for part in weight.path.split("/"):
                leaf = leaf[part]
            leaf[place] = weight.look(golden[f"base/{name}"])
    adapters = init_lora(jax.random.key(0), params, settings["r"], ["query", "value", "out", "down"])
    adapters = jax.tree.map(np.array, adapters)
    for theirs, ours in OURS.items():
        leaves = adapters["blocks"][theirs.split(".")[0].replace("self_attn", "attention")][ours]
        for layer in range(model.config.layers):
            name = f"adapters/base_model.model.model.layers.{layer}.{theirs}"
            for leaf, key in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                leaves[leaf][layer] = golden[f"{name}.{key}.weight"].T.reshape(leaves[leaf][layer].shape)
    return model, jax.tree.map(jnp.asarray, join(params, adapters))


def test_logits_are_those_of_peft(golden, adapted):
    model, params = adapted
    tokens = jnp.asarray(golden["tokens"], jnp.int32)
    logits = jax.jit(model.logits)
    got = logits(params, tokens, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(got, golden["logits"], atol=1e-5, rtol=1e-4)
    without = logits(split(params)[0], tokens, jnp.ones(tokens.shape, bool))
    assert np.abs(without - golden["logits"]).max() > 0.1


def test_files_are_those_that_peft_writes(golden, adapted, tmp_path):
    # meant to catch A and B that change places, heads that are mixed up, and a scale that is applied twice
    export_adapters(tmp_path / "adapters", *adapted)
    header = read_header(tmp_path / "adapters" / TENSORS)
    wanted = {name.removeprefix("adapters/"): value for name, value in golden.items() if name.startswith("adapters/")}
    assert header.keys() == wanted.keys()
    for name, tensor in header.items():
        np.testing.assert_array_equal(read_tensor(tensor, name), wanted[name])
    settings = json.loads((tmp_path / "adapters" / SETTINGS).read_text(encoding="utf-8"))
    theirs = json.loads(str(golden["settings"]))
    assert settings.keys() <= theirs.keys()
    assert sorted(settings.pop("target_modules")) == sorted(theirs["target_modules"])
    assert settings == {name: theirs[name] for name in settings}


def test_only_adapters_of_a_policy_can_be_written(adapted, tmp_path):
    model, params = adapted
    with pytest.raises(ConfigError, match="a policy with adapters, got one without"):
        export_adapters(tmp_path / "a", model, split(params)[0])
    scalar = {"decoder": params, "head": {"kernel": jnp.ones(16), "bias": jnp.zeros(())}}
    with pytest.raises(ConfigError, match="a policy with adapters, got a scalar model"):
        export_adapters(tmp_path / "a", model, scalar)
    gpt2 = LanguageModel(decoder_config("gpt2", vocab_size=16, layers=1, width=8, heads=2, context=8))
    params = jax.jit(gpt2.init)(jax.random.key(0))
    params = join(params, init_lora(jax.random.key(0), params, 2, ["query"]))
    with pytest.raises(ConfigError, match=r"c_attn.*holds more than blocks/attention/query"):
        export_adapters(tmp_path / "a", gpt2, params)
    assert not list(tmp_path.iterdir())


_COMPUTE = """
import sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32)
tokens = torch.tensor(np.load(folder + "/tokens.npy"))
with torch.no_grad():
    model = PeftModel.from_pretrained(base, folder + "/adapters").eval()
    np.save(folder + "/logits.npy", model(tokens).logits.numpy())
"""


@pytest.mark.live
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_them_and_computes_the_same(family, tmp_path):
    found = subprocess.run([PYTHON, "-c", "import peft, transformers"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("peft and transformers are not installed; PYTHON_WITH_PEFT may name a Python that has them")
    shape = {"vocab_size": 40, "layers": 3, "width": 32, "heads": 4, "context": 32}
    model = LanguageModel(decoder_config(family, **shape, **({"kv_heads": 2} if family == "llama" else {})))
    base = jax.jit(model.init)(jax.random.key(0))
    targets = ["query", "key", "value", "out", "mlp"] if family == "llama" else ["out", "mlp/up", "mlp/down"]
    adapters = init_lora(jax.random.key(1), base, 4, targets)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), adapters)
    params = join(base, adapters)
    export_model(tmp_path / "base", "policy", model, base, None)
    export_adapters(tmp_path / "adapters", model, params)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens.astype(np.int64))
    subprocess.run([PYTHON, "-c", _COMPUTE, str(tmp_path)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    got = np.load(tmp_path / "logits.npy")
    want = model.logits(params, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(want, got, atol=1e-4, rtol=1e-4)
    assert np.abs(want - model.logits(base, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))).max() > 0.1
