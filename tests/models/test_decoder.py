"""What the decoder must not depend on: the cache, padding, packing, rematerialisation."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, WINDOWED, left_mask, params_of, random_tokens, right_mask, tiny

from rlhfjax.models import DecoderConfig, compute_dtype, decoder_config
from rlhfjax.models.decoder import FAMILIES
from rlhfjax.models.interface import positions_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STYLES = ["gpt2", "llama-gqa", *WINDOWED]


# fails when decode counts positions from the padded length, or the cache forgets which slots are padding: seen
@pytest.mark.parametrize("style", STYLES)
def test_cached_decode_equals_the_full_forward(style):
    model = tiny(style)
    params, prompt, mask = params_of(model), random_tokens(3, 5), left_mask([5, 2, 1], 5)
    response = random_tokens(3, 4, seed=1)

    def decoded(params):
        logits, cache = model.prefill(params, prompt, mask, 4)
        steps = [logits]
        for t in range(3):
            logits, cache = model.decode(params, cache, response[:, t])
            steps.append(logits)
        return jnp.stack(steps, axis=1)

    full = jax.jit(model.response_logits)(params, prompt, mask, response, jnp.ones((3, 4), bool))
    np.testing.assert_allclose(jax.jit(decoded)(params), full, **CLOSE)


def test_positions_count_real_tokens():
    mask = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    positions = positions_of(mask)
    assert positions[mask].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert positions.min() >= 0


# fails with positions = arange, or without the segment test in the attention mask: seen
@pytest.mark.parametrize("style", STYLES)
def test_padding_on_either_side_and_what_it_holds_change_nothing(style):
    model = tiny(style)
    params, document = params_of(model), random_tokens(5, seed=2)
    junk = random_tokens(4, 10, seed=3)
    rows, masks = [], []
    for row, start in enumerate((0, 1, 3, 5)):
        rows.append(junk[row].at[start : start + 5].set(document))
        masks.append((jnp.arange(10) >= start) & (jnp.arange(10) < start + 5))
    mask = jnp.stack(masks)
    got = jax.jit(model.logits)(params, jnp.stack(rows), mask)
    assert jnp.isfinite(got).all()
    real = got[mask].reshape(4, 5, VOCAB)
    for row in real[1:]:
        np.testing.assert_allclose(row, real[0], **CLOSE)


# meant to catch queries that see other segments, and positions that run on over the whole row
@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_equal_the_same_documents_apart(style):
    model = tiny(style)
    params, tokens = params_of(model), random_tokens(1, 9)

    def logits(tokens, positions, segments):
        return model.unembed(params, model.hidden(params, tokens, positions, segments))

    def row(*values):
        return jnp.asarray([values], jnp.int32)

    packed = jax.jit(logits)(tokens, row(0, 1, 2, 3, 0, 1, 2, 0, 0), row(1, 1, 1, 1, 2, 2, 2, 0, 0))[0]
    apart = jnp.concatenate([tokens[:, :4], tokens[:, 4:7].repeat(2, axis=1)[:, :4]])
    apart = apart.at[1].set(jnp.pad(tokens[0, 4:7], (0, 1)))
    alone = jax.jit(model.logits)(params, apart, right_mask([4, 3], 4))
    np.testing.assert_allclose(packed[:4], alone[0], **CLOSE)
    np.testing.assert_allclose(packed[4:7], alone[1, :3], **CLOSE)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_value_nor_gradient(remat):
    # fails if the policy drops or repeats a layer; the three programs are really different: the last assertion
    tokens, mask = random_tokens(2, 6), right_mask([6, 3], 6)
    params = params_of(tiny())

    def value_and_gradient(model):
        def loss(params):
            return jnp.where(mask[:, :, None], model.logits(params, tokens, mask), 0.0).var()

        return jax.jit(jax.value_and_grad(loss))

    style = {"attention": "xla"}  # the others compute scores again by themselves
    plain, again = value_and_gradient(tiny(**style)), value_and_gradient(tiny(remat=remat, **style))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), plain(params), again(params))
    assert "remat" in str(again.trace(params).jaxpr)
    assert "remat" not in str(plain.trace(params).jaxpr)


def test_dropout_needs_a_key_and_follows_it():
    # fails when the rate is used without a key: seen
    model, tokens = tiny(), random_tokens(2, 6)
    params, ones = params_of(model), jnp.ones((2, 6), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(6)[None, :], (2, 6))
    off = jax.jit(lambda: model.hidden(params, tokens, positions, ones, dropout=0.5))()
    plain = jax.jit(lambda: model.hidden(params, tokens, positions, ones))()
    dropped = jax.jit(lambda key: model.hidden(params, tokens, positions, ones, 0.5, key))
    np.testing.assert_array_equal(off, plain)
    np.testing.assert_array_equal(dropped(jax.random.key(0)), dropped(jax.random.key(0)))
    assert jnp.abs(dropped(jax.random.key(0)) - plain).max() > 0.1
    assert jnp.abs(dropped(jax.random.key(0)) - dropped(jax.random.key(1))).max() > 0.1


@pytest.mark.parametrize("style", ["llama-gqa", "gemma2"])
def test_logits_are_float32_whatever_the_computation(style):
    # bfloat16 keeps 8 bits: near the float32 result, not equal to it
    tokens, mask = random_tokens(2, 6), jnp.ones((2, 6), bool)
    model, params = tiny(style, dtype="bfloat16"), params_of(tiny(style))
    with jax.numpy_dtype_promotion("standard"):  # the norms of Flax promote
        half = jax.jit(model.logits)(params, tokens, mask)
    full = jax.jit(tiny(style).logits)(params, tokens, mask)
    assert half.dtype == jnp.float32
    assert 0 < jnp.abs(half - full).max() < 0.1 * jnp.abs(full).max()


def test_fresh_parameters_have_the_deviations_of_gpt2():
    # fails without the residual scaling 1/sqrt(2 layers), or with one key for all layers: seen
    model = tiny("gpt2", width=64, vocab_size=512, layers=3)
    params = jax.jit(model.init)(jax.random.key(0))
    blocks = params["blocks"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for kernel in (params["embed"]["embedding"], blocks["attention"]["query"]["kernel"], blocks["mlp"]["up"]["kernel"]):
        assert kernel.std() == pytest.approx(0.02, rel=0.05)
    for kernel in (blocks["attention"]["out"]["kernel"], blocks["mlp"]["down"]["kernel"]):
        assert kernel.std() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert jnp.abs(blocks["mlp"]["up"]["kernel"][0] - blocks["mlp"]["up"]["kernel"][1]).max() > 0.01
    assert jnp.abs(blocks["mlp"]["up"]["bias"]).max() == 0
    assert jnp.abs(blocks["mlp_norm"]["scale"] - 1).max() == 0


def test_families():
    shape = {"vocab_size": 8, "layers": 1, "width": 48, "heads": 4, "context": 8}
    gpt2, llama = decoder_config("gpt2", **shape), decoder_config("llama", **shape, kv_heads=2)
    assert (gpt2.norm, gpt2.positions, gpt2.activation, gpt2.biases) == ("layer", "learned", "gelu", True)
    assert (llama.norm, llama.positions, llama.activation, llama.biases) == ("rms", "rope", "swiglu", False)
    assert (gpt2.kv_heads, gpt2.head_dim, gpt2.mlp_width) == (4, 12, 192)
    assert (llama.kv_heads, llama.head_dim, llama.mlp_width) == (2, 12, 128)  # 8/3 of the width, in eights
    changed = decoder_config("llama", **shape, mlp_width=50, head_dim=6, norm=None, tied=False)
    assert (changed.mlp_width, changed.head_dim, changed.norm, changed.tied) == (50, 6, "rms", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_goes_through_json(family):
    config = decoder_config(family, vocab_size=8, layers=7, width=48, heads=4, context=8)
    again = DecoderConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_layers_with_the_window_follow_the_pattern():
    def local(family):
        config = decoder_config(family, vocab_size=8, layers=7, width=48, heads=4, context=8)
        return "".join("GL"[is_local] for is_local in config.local_layers)

    assert (local("llama"), local("mistral")) == ("GGGGGGG", "LLLLLLL")
    assert (local("gemma2"), local("gemma3")) == ("LGLGLGL", "LLLLLGL")


def test_old_checkpoints_describe_the_same_decoder():
    # the fields that a checkpoint's meta had before there were other families
    old = {"vocab_size": 8, "layers": 1, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_width": 48}
    old |= {"context": 8, "norm": "rms", "positions": "rope", "activation": "swiglu", "biases": False, "tied": True}
    old |= {"norm_eps": 1e-5, "rope_theta": 1e4, "init_std": 0.02, "remat": "none", "dtype": "float32"}
    shape = {name: old[name] for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "mlp_width", "context")}
    assert DecoderConfig(**old) == decoder_config("llama", **shape)


def test_compute_dtype_on_this_machine():
    assert compute_dtype("auto") == "float32"  # a CPU
    assert compute_dtype("bfloat16") == "bfloat16"
