"""The encoder–decoder against PyTorch's Transformer, and what may and may not reach what."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    VOCAB,
    assert_equal_gradients,
    left_mask,
    params_of,
    random_tokens,
    right_mask,
    scalar_params_of,
    stored,
)

from rlhfjax.models import EncoderDecoder, EncoderDecoderConfig
from rlhfjax.models.transformer_2017 import sinusoids
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.types import TokenBatch

GOLDEN = Path(__file__).parents[1] / "golden"
START, PROMPT, RESPONSE = 1, 6, 5
MODEL = EncoderDecoder(EncoderDecoderConfig(VOCAB, 2, 16, 4, 24, 32, START))
NAMES = {"self_attn": "attention", "multihead_attn": "cross_attention", "linear1": "mlp/up", "linear2": "mlp/down"}


def ours(golden: dict) -> dict:
    """PyTorch's weights in our tree: [out, in] matrices become [in, heads, size] by head, layers are stacked."""

    def block(prefix: str, norms: tuple[str, ...]) -> dict:
        tree = {}
        for theirs, name in NAMES.items():
            if theirs.startswith("linear"):
                weight = {"kernel": golden[f"{prefix}.{theirs}.weight"].T, "bias": golden[f"{prefix}.{theirs}.bias"]}
                tree.setdefault("mlp", {})[name.removeprefix("mlp/")] = weight
            elif f"{prefix}.{theirs}.in_proj_weight" in golden:
                kernels = np.split(golden[f"{prefix}.{theirs}.in_proj_weight"], 3)
                biases = np.split(golden[f"{prefix}.{theirs}.in_proj_bias"], 3)
                tree[name] = {
                    part: {"kernel": kernel.T.reshape(16, 4, 4), "bias": bias.reshape(4, 4)}
                    for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
                }
                out = golden[f"{prefix}.{theirs}.out_proj.weight"].T.reshape(4, 4, 16)
                tree[name]["out"] = {"kernel": out, "bias": golden[f"{prefix}.{theirs}.out_proj.bias"]}
        for number, name in enumerate(norms, 1):
            tree[name] = {
                "scale": golden[f"{prefix}.norm{number}.weight"],
                "bias": golden[f"{prefix}.norm{number}.bias"],
            }
        return tree

    def stacked(side: str, norms: tuple[str, ...]) -> dict:
        layers = [block(f"{side}.layers.{layer}", norms) for layer in range(2)]
        return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    return {
        "embed": {"embedding": jnp.asarray(golden["embed.weight"])},
        "encoder": stacked("encoder", ("attention_norm", "mlp_norm")),
        "decoder": stacked("decoder", ("attention_norm", "cross_attention_norm", "mlp_norm")),
    }


def check_parity(golden: dict) -> None:
    model = EncoderDecoder(replace(MODEL.config, vocab_size=len(golden["embed.weight"])))
    params = ours(golden)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    source, target = golden["source"].astype(np.int32), golden["target"].astype(np.int32)
    assert (target[:, 0] == START).all()
    response = np.concatenate([target[:, 1:], target[:, :1]], axis=1)  # the last is read by nothing that is compared
    parts = (source, right_mask(golden["lengths"], 6), response, jnp.ones((3, 5), bool))
    logits = jax.jit(model.response_logits)(params, *parts)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    assert np.abs(golden["logits"]).max() > 1


def test_logits_are_those_of_torch():
    check_parity(stored(GOLDEN / "encoder_decoder.npz"))


@pytest.mark.live
def test_logits_are_those_of_torch_for_other_weights():
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make_encoder_decoder.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    check_parity(make.reference(seed=5))


def test_positions_are_the_papers():
    table = np.asarray(sinusoids(jnp.arange(40, dtype=jnp.int32)[None], 6))[0]
    for p, i in [(0, 0), (1, 0), (7, 1), (39, 2)]:
        assert table[p, 2 * i] == pytest.approx(np.sin(p / 10_000 ** (2 * i / 6)), abs=1e-5)
        assert table[p, 2 * i + 1] == pytest.approx(np.cos(p / 10_000 ** (2 * i / 6)), abs=1e-5)


def test_fresh_parameters_are_xaviers():
    model = EncoderDecoder(EncoderDecoderConfig(500, 2, 64, 4, 128, 32, START))
    params = jax.jit(model.init)(jax.random.key(0))
    block = params["decoder"]["blocks"]
    # U(-a, a) with a = sqrt(6 / (inputs + outputs)), inputs and outputs over all heads
    for kernel, sizes in [
        (block["cross_attention"]["query"]["kernel"], 64 + 64),
        (block["attention"]["out"]["kernel"], 64 + 64),
        (block["mlp"]["up"]["kernel"], 64 + 128),
    ]:
        bound = (6 / sizes) ** 0.5
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not np.any(block["mlp"]["up"]["bias"])
    assert params["embed"]["embedding"].std() == pytest.approx(64**-0.5, rel=0.02)


def parts(rows: int = 4, seed: int = 0) -> tuple:
    """Left-padded prompts and right-padded responses of every length."""
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, PROMPT + 1, rows), rng.integers(1, RESPONSE + 1, rows)
    prompts[0], responses[0], responses[1] = PROMPT, RESPONSE, 1
    return (
        random_tokens(rows, PROMPT, seed=seed),
        left_mask(prompts, PROMPT),
        random_tokens(rows, RESPONSE, seed=seed + 1),
        right_mask(responses, RESPONSE),
    )


def test_cached_decoding_is_the_full_forward_pass():
    params, (prompt, prompt_mask, response, mask) = params_of(MODEL), parts()
    expected = jax.jit(MODEL.response_logits)(params, prompt, prompt_mask, response, mask)
    logits, cache = jax.jit(MODEL.prefill, static_argnums=3)(params, prompt, prompt_mask, RESPONSE)
    decode, made = jax.jit(MODEL.decode), [logits]
    for t in range(RESPONSE - 1):
        logits, cache = decode(params, cache, response[:, t])
        made.append(logits)
    gap = jnp.abs(jnp.stack(made, axis=1) - expected)
    assert gap[mask].max() < 1e-4
    assert expected[mask].std() > 0.5


def test_no_future_target_reaches_a_logit():
    """The derivative of the logits at t by the embedding of response token u is 0 for u >= t, and not before."""
    # Every slot of the response has a token id of its own, so that a row of the embedding is one slot of it. Hidden
    # states are read in place of logits, because the unembedding is the same table.
    model = EncoderDecoder(replace(MODEL.config, vocab_size=VOCAB + RESPONSE))
    params, (prompt, prompt_mask, _, _) = params_of(model), parts()
    response = jnp.arange(RESPONSE, dtype=jnp.int32)[None] + VOCAB

    def hidden(embedding, t):
        args = (params | {"embed": {"embedding": embedding}}, prompt[:1], prompt_mask[:1], response)
        return model._response_hidden(*args, jnp.ones((1, RESPONSE), bool))[0, t].sum()

    slope = jax.jit(jax.grad(hidden))
    for t in range(RESPONSE):
        reach = np.abs(slope(params["embed"]["embedding"], t)[VOCAB:]).sum(axis=1)
        assert (reach[:t] > 1e-6).all()
        assert (reach[t:] == 0).all()


def test_padding_has_no_influence():
    params, scalar = params_of(MODEL), scalar_params_of(MODEL)
    prompt, prompt_mask, response, mask = parts()
    other = (jnp.where(prompt_mask, prompt, 3), prompt_mask, jnp.where(mask, response, 7), mask)
    wider = (
        jnp.pad(prompt, ((0, 0), (3, 0)), constant_values=5),
        jnp.pad(prompt_mask, ((0, 0), (3, 0))),
        jnp.pad(response, ((0, 0), (0, 2)), constant_values=9),
        jnp.pad(mask, ((0, 0), (0, 2))),
    )
    logits, scores = jax.jit(MODEL.response_logits), jax.jit(MODEL.response_scores)
    plain = (prompt, prompt_mask, response, mask)
    base, score = logits(params, *plain), scores(scalar, *plain)
    for changed in (other, wider):
        np.testing.assert_allclose(logits(params, *changed)[:, :RESPONSE][mask], base[mask], atol=2e-5)
        np.testing.assert_allclose(scores(scalar, *changed), score, atol=2e-5)
    moved = (prompt.at[0, 2].add(1), prompt_mask, response, mask)
    assert np.abs(logits(params, *moved)[0] - base[0]).max() > 1e-2


def joined(rows: list[list[tuple[list[int], list[int]]]], length: int) -> TokenBatch:
    """Pairs of prompt and response packed into rows, as the reader packs them."""
    arrays = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "segments", "positions", "targets")}
    for row, pairs in enumerate(rows):
        at = 0
        for number, (prompt, response) in enumerate(pairs, 1):
            span = slice(at, at := at + len(prompt) + len(response))
            arrays["tokens"][row, span] = prompt + response
            arrays["segments"][row, span] = number
            arrays["positions"][row, span] = np.arange(len(prompt) + len(response))
            arrays["targets"][row, span] = [0] * len(prompt) + [1] * len(response)
    targets = arrays.pop("targets").astype(bool)
    return TokenBatch(**{name: jnp.asarray(value) for name, value in arrays.items()}, loss_mask=jnp.asarray(targets))


def test_packed_rows_give_the_logits_of_each_pair_alone():
    params, (prompt, prompt_mask, response, mask) = params_of(MODEL), parts()
    pairs = [(prompt[i][prompt_mask[i]].tolist(), response[i][mask[i]].tolist()) for i in range(4)]
    expected = jax.jit(MODEL.response_logits)(params, prompt, prompt_mask, response, mask)
    made = jax.jit(MODEL.token_logits)(params, joined([pairs[:2], pairs[2:]], 24))
    for row in range(2):
        at = 0
        for i in (2 * row, 2 * row + 1):
            first, count = at + len(pairs[i][0]), len(pairs[i][1])
            # The logits that predict token t are those of the slot before it.
            np.testing.assert_allclose(made[row, first - 1 : first - 1 + count], expected[i, :count], atol=2e-5)
            at = first + count


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_columns_read_alone_are_those_of_all(rate):
    params = params_of(MODEL)
    rows = joined([[([2, 3, 4], [5, 6]), ([7], [8, 9])], [([3, 1], [4])]], 8)
    columns = jnp.asarray([[6, 2, 3], [1, 7, 0]], jnp.int32)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)

    def run(read):
        def loss(params, key):
            hidden = MODEL.batch_hidden(params, rows, rate, key, read)
            if read is None:
                hidden = jnp.take_along_axis(hidden, columns[:, :, None], axis=1)
            return (hidden * weights).sum(), hidden

        key = jax.random.key(1) if rate else None
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, key)

    ((_, got), grads), ((_, wanted), wanted_grads) = run(columns), run(None)
    np.testing.assert_allclose(got, wanted, atol=1e-5)  # fused in another way
    assert_equal_gradients(grads, wanted_grads, "columns")


def test_scores_of_joined_rows_are_those_of_the_pair():
    params, (prompt, prompt_mask, response, mask) = scalar_params_of(MODEL), parts()
    expected = jax.jit(MODEL.response_scores)(params, prompt, prompt_mask, response, mask)
    pairs = [[(prompt[i][prompt_mask[i]].tolist(), response[i][mask[i]].tolist())] for i in range(4)]
    rows = joined(pairs, PROMPT + RESPONSE)
    lengths = prompt_mask.sum(axis=1, dtype=jnp.int32)
    made = jax.jit(MODEL.scores)(params, rows.tokens, rows.segments > 0, lengths)
    np.testing.assert_allclose(made, expected, atol=2e-5)
    assert expected.std() > 0.1


def test_dropout_needs_a_key_and_reaches_both_halves():
    params, rows = params_of(MODEL), joined([[([2, 3, 4], [5, 6])]], 8)
    dropped = jax.jit(MODEL.token_logits, static_argnums=2)
    plain = dropped(params, rows, 0.0, None)
    np.testing.assert_array_equal(dropped(params, rows, 0.5, None), plain)
    first, second = (dropped(params, rows, 0.5, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(first - plain).max() > 1e-2
    assert np.abs(first - second).max() > 1e-2
    inputs = (params, rows.tokens, rows.positions, rows.segments)
    read = MODEL._apply("encode", *inputs, dropout=0.5, key=jax.random.key(0))
    kept = MODEL._apply("encode", *inputs)
    assert np.abs(read - kept).max() > 1e-2


def test_every_parameter_lies_on_the_mesh():
    mesh = make_mesh(2, 2, 1, 2)
    shapes = jax.eval_shape(MODEL.init_scalar, jax.random.key(0))
    laid_out = state_shardings(mesh, shapes)["decoder"]["decoder"]["blocks"]
    assert tuple(laid_out["cross_attention"]["query"]["kernel"].spec) == (None, "fsdp", "tensor", None)
    assert tuple(laid_out["cross_attention"]["out"]["bias"].spec) == (None, "fsdp")


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    params, rows = params_of(MODEL), joined([[([2, 3, 4], [5, 6])]], 8)

    def slope(model):
        return jax.jit(jax.grad(lambda p: jax.nn.logsumexp(model.token_logits(p, rows), axis=-1).sum()))(params)

    other = EncoderDecoder(replace(MODEL.config, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), slope(MODEL), slope(other))
