"""What the decoder must not depend on: the cache, padding, packing, rematerialisation, which columns are read."""

import json
import re
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    LATER,
    VOCAB,
    WINDOWED,
    assert_equal_gradients,
    left_mask,
    params_of,
    random_tokens,
    random_tree,
    right_mask,
    scalar_params_of,
    tiny,
    token_batch,
)

from rlhfjax.models import DecoderConfig, compute_dtype, decoder_config, splash
from rlhfjax.models.decoder import FAMILIES
from rlhfjax.models.interface import positions_of
from rlhfjax.models.lora import init_lora, join
from rlhfjax.models.rotary import rotate, turns

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STYLES = ["gpt2", "llama-gqa", *WINDOWED, *LATER]
# What has no layer or mask that another style lacks is slow where rows are only laid out otherwise.
LAID_OUT = [
    pytest.param(style, marks=[] if style in ("gpt2", "llama-gqa", "gemma3", "mixed") else pytest.mark.slow)
    for style in STYLES
]
ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="done for CPUs alone")
# Style, changes to it, rate of dropout. The last six have no last layer of their own.
READERS = {
    "gpt2": ("gpt2", {}, 0.0),
    "post-norm": ("gpt2", {"norm_place": "post"}, 0.0),
    "window, then none": ("gemma3", {}, 0.0),
    "none, then window": ("gemma3", {"window_pattern": "GLL"}, 0.0),
    "soft caps": ("gemma2", {}, 0.0),
    "blocks beside each other": ("gpt_neox", {}, 0.0),
    "sinks": ("mixed", {"attention_sinks": True, "biases": True}, 0.0),
    "layers of several kinds": ("mixed", {}, 0.0),
    "adapters": ("llama", {}, 0.0),
    "experts": ("llama", {"experts": 4, "experts_per_token": 2}, 0.0),
    "remat": ("llama", {"remat": "full"}, 0.0),
    "dropout": ("llama", {}, 0.5),
    "dropout, post-norm": ("gpt2", {"norm_place": "post"}, 0.5),
    "one layer": ("llama", {"layers": 1}, 0.0),
    "nine layers": ("llama", {"layers": 9}, 0.0),
}
ALIKE = ("window, then none", "dropout, post-norm", "nine layers")  # each is two of the others


# fails with the columns of another row, without a sum's own half, with the window of another layer: seen
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in ALIKE else []) for case in READERS]
)
def test_columns_read_alone_are_those_of_all(case):
    style, changes, rate = READERS[case]
    model, batch = tiny(style, **changes), token_batch(3, 8)
    params = params_of(model, std=0.2 if case == "nine layers" else 0.4)
    if case == "adapters":
        shapes = jax.eval_shape(lambda key: init_lora(key, params, 3, ["."]), jax.random.key(0))
        params = join(params, random_tree(shapes, 5, 0.2))
    columns = jnp.asarray([[1, 0, 1], [7, 2, 5], [4, 6, 3]], jnp.int32)  # in any order, and one of them twice
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 16)), jnp.float32)

    def loss(params, key, read):
        hidden = model.batch_hidden(params, batch, rate, key, read)
        if read is None:
            hidden = jnp.take_along_axis(hidden, columns[:, :, None], axis=1)
        return (hidden * weights).sum(), hidden

    @jax.jit  # as one program, whose layers are traced once
    def both(params, key):
        run = jax.value_and_grad(loss, has_aux=True)
        return run(params, key, columns), run(params, key, None)

    ((_, got), grads), ((_, wanted), wanted_grads) = both(params, jax.random.key(1) if rate else None)
    assert got.shape == (3, 3, 16)
    # products of other shapes add in another order
    np.testing.assert_allclose(got, wanted, **CLOSE)
    assert_equal_gradients(grads, wanted_grads, case)


@ON_CPU
@pytest.mark.parametrize("attention", ["auto", "splash"])
def test_models_of_one_shape_share_the_traces_of_their_layers(attention, monkeypatch):
    # Broken once: without the cache 4 of each.
    monkeypatch.setattr(splash, "INTERPRET", True)
    model, tokens, mask = tiny(attention=attention), random_tokens(2, 16), jnp.ones((2, 16), bool)
    first, second = scalar_params_of(model, 0), scalar_params_of(model, 1)
    both = jax.jit(lambda *models: [model.scores(params, tokens, mask) for params in models])
    lowered = both.lower(first, second).as_text()
    layers = re.findall(r"func private @apply(_\d+)?\(", lowered)
    assert len(layers) == 2  # two of a model, of which one is the last
    for got, params in zip(both(first, second), (first, second), strict=True):
        np.testing.assert_allclose(got, jax.jit(model.scores)(params, tokens, mask), **CLOSE)


@ON_CPU
def test_a_score_costs_less_than_all_hidden_states():
    model, tokens, mask = tiny(), random_tokens(4, 16), jnp.ones((4, 16), bool)
    params = scalar_params_of(model)

    def flops(function):
        return jax.jit(function).lower(params).compile().cost_analysis()["flops"]

    def everywhere(params):
        return model.hidden(params["decoder"], tokens, positions_of(mask), mask.astype(jnp.int32))

    # Of the last of two layers, only keys and values are computed everywhere.
    assert flops(lambda p: model.scores(p, tokens, mask, jnp.full(4, 8, jnp.int32))) < 0.75 * flops(everywhere)


@ON_CPU
@pytest.mark.parametrize(("style", "times"), [("llama-gqa", 1), ("gemma3", 2), ("gpt2", 0)])
def test_angles_are_turned_into_sines_once_for_all_layers(style, times):
    # once for each kind of layers; fails without the product in `settled`: seen
    model, tokens, ones = tiny(style, layers=4), random_tokens(2, 8), jnp.ones((2, 8), jnp.int32)

    def hidden(params, positions):
        return model.hidden(params, tokens, positions, ones)

    shapes = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    program = jax.jit(hidden).lower(*shapes).compile().as_text()
    assert (program.count(" cosine("), program.count(" sine(")) == (times, times)


def test_rope_multiplies_complex_numbers():
    # the two halves of a head are real and imaginary parts
    config = tiny("gemma3", head_dim=6).config
    rng = np.random.default_rng(0)
    positions, x = rng.integers(0, 40, (3, 7)), rng.normal(size=(3, 7, 4, 6))
    both = turns(config, jnp.asarray(positions, jnp.int32))
    assert set(both) == {False, True}
    for local, theta in ((False, 1e6), (True, 1e4)):
        angle = positions[..., None, None] * theta ** (-np.arange(3) / 3)
        turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)
        got = rotate(jnp.asarray(x, jnp.float32), both[local])
        # an angle near 40 is rounded by 2e-6
        np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)
    assert turns(tiny("gpt2").config, jnp.asarray(positions, jnp.int32)) == {}


# fails when decode counts positions from the padded length, or the cache forgets which slots are padding: seen
@pytest.mark.parametrize("style", STYLES)
def test_cached_decode_equals_the_full_forward(style):
    model = tiny(style)
    params, prompt, mask = params_of(model), random_tokens(3, 5), left_mask([5, 2, 1], 5)
    response = random_tokens(3, 4, seed=1)

    @jax.jit
    def both(params):
        first, cache = model.prefill(params, prompt, mask, 4)

        def step(cache, token):
            logits, cache = model.decode(params, cache, token)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, response[:, :3].T)
        full = model.response_logits(params, prompt, mask, response, jnp.ones((3, 4), bool))
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1), full

    decoded, full = both(params)
    np.testing.assert_allclose(decoded, full, rtol=1e-5, atol=2e-5)


def test_positions_count_real_tokens():
    mask = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    positions = positions_of(mask)
    assert positions[mask].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert positions.min() >= 0


# fails with positions = arange, or without the segment test in the attention mask: seen
@pytest.mark.parametrize("style", LAID_OUT)
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
@pytest.mark.parametrize("style", LAID_OUT)
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
    assert str(again.trace(params).jaxpr).count("remat") > str(plain.trace(params).jaxpr).count("remat")


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
