"""Heads that predict tokens further ahead: what they compute, where their parameters go, and who does without them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from tiny import VOCAB, params_of, random_tokens, tiny

from rlhfjax.interop.exporting import export_model
from rlhfjax.models.lora import init_lora, join, linears, split
from rlhfjax.sharding import make_mesh, state_shardings


def with_heads(heads=2, **changes):
    model = tiny(mtp_heads=heads, **changes)
    return model, params_of(model, seed=3)


def test_each_head_adds_its_own_block_to_the_hidden_state():
    # meant to catch heads that share a matrix, a missing residual, and matrices taken the wrong way round
    model, params = with_heads()
    hidden = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    heads = jax.tree.map(np.asarray, params["mtp_heads"])
    got = model.ahead(params, jnp.asarray(hidden))
    assert got.shape == (2, 2, 3, 16)
    for n in range(2):
        inner = hidden @ heads["up"][n]
        wanted = hidden + inner / (1 + np.exp(-inner)) @ heads["down"][n]
        np.testing.assert_allclose(got[n], wanted, rtol=1e-4, atol=1e-4)


def test_fresh_heads_repeat_the_prediction_of_the_next_token():
    model = tiny(mtp_heads=3)
    params = model.init(jax.random.key(0))
    hidden = jnp.ones((1, 2, 16))
    np.testing.assert_array_equal(model.ahead(params, hidden), jnp.broadcast_to(hidden[None], (3, 1, 2, 16)))
    assert len({float(up.std()) for up in params["mtp_heads"]["up"]}) == 3  # and can come to differ


def test_a_model_without_heads_is_what_it_was():
    plain, model = tiny(), tiny(mtp_heads=2)
    params = model.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, plain.init(jax.random.key(0)), without(params))
    tokens = random_tokens(2, 5)
    mask = jnp.ones(tokens.shape, bool)
    np.testing.assert_array_equal(model.logits(params, tokens, mask), plain.logits(without(params), tokens, mask))
    scalar = jax.eval_shape(model.init_scalar, jax.random.key(0))
    assert jax.tree.structure(scalar) == jax.tree.structure(jax.eval_shape(plain.init_scalar, jax.random.key(0)))


def without(params):
    return {name: tree for name, tree in params.items() if name != "mtp_heads"}


def test_heads_are_split_like_other_matrices_and_belong_to_the_base_of_adapters():
    _, params = with_heads()
    layout = state_shardings(make_mesh(2, 2, 1, 2), params)["mtp_heads"]
    assert {sharding.spec for sharding in layout.values()} == {P(None, "fsdp", None)}
    assert not any("mtp_heads" in path for path in linears(params))
    adapted = join(params, init_lora(jax.random.key(0), params, 2, ["query"]))
    frozen, trained = split(adapted)
    assert "mtp_heads" in frozen
    assert "mtp_heads" not in trained


def test_an_export_leaves_them_out_and_says_so(tmp_path):
    model, params = with_heads()
    parity = export_model(tmp_path / "out", "policy", model, params, None)
    assert parity == json.loads((tmp_path / "out" / "parity.json").read_text())
    assert "| mtp_heads | 2, which predict tokens further ahead" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == VOCAB
