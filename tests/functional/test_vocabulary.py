"""Chunks of tokens against the whole matrix of logits, on any devices, and the memory that they save."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.functional import entropy, token_log_probs
from rlhfjax.functional.likelihood import smoothed_cross_entropy
from rlhfjax.functional.vocabulary import vocabulary_cross_entropy, vocabulary_hits, vocabulary_log_probs
from rlhfjax.layout import laid_out_by
from rlhfjax.sharding import make_mesh
from rlhfjax.sharding.activations import layout_of

ROWS, LENGTH, WIDTH, WORDS = 4, 6, 6, 11
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(WORDS, WIDTH)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, WORDS, (ROWS, LENGTH)), jnp.int32)
MASK = jnp.asarray(RNG.random((ROWS, LENGTH)) < 0.5)
WEIGHTS = jnp.asarray(RNG.normal(size=(2, ROWS, LENGTH)), jnp.float32)
TEMPERATURE, SMOOTHING = 0.7, 0.1


def logits(table, hidden, softcap):
    z = jnp.einsum("btd,vd->btv", hidden, table)
    return softcap * jnp.tanh(z / softcap) if softcap else z


def close(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


FORMS = [(True, None), (False, None), (True, 1.5)]
# Parts of the words (which never divide), of the rows, of the tokens of a row and of the width.
MESHES = {
    "one device": {},
    "rows, width and words": {"data": 2, "fsdp": 2, "tensor": 2},
    "tokens of a row": {"tensor": 2, "sequence": 2, "fsdp": 2},
    "rows that do not divide": {"fsdp": 2, "expert": 4},
}


def on(mesh, function, *arguments):
    """What a compiled function gives on a mesh of that shape."""
    devices = make_mesh(**MESHES[mesh], devices=jax.devices() if MESHES[mesh] else jax.devices()[:1])
    with laid_out_by(layout_of(devices)):
        return jax.jit(function)(*arguments)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
@pytest.mark.parametrize(("tied", "softcap"), FORMS)
def test_log_probs_entropies_and_their_gradients(tied, softcap, chunk, mesh):
    # meant to catch a chunk left out, an entropy without a gradient, and a soft cap without its slope
    def whole(table, hidden):
        z = logits(table, hidden, softcap)
        made = token_log_probs(z, TOKENS, TEMPERATURE), entropy(z, TEMPERATURE)
        return jnp.where(MASK, jnp.stack(made) * WEIGHTS, 0.0).sum(axis=0)

    def chunked(table, hidden):
        form = {"chunk": chunk, "tied": tied, "softcap": softcap, "entropy_gradient": True}
        table = table if tied else table.T
        made = vocabulary_log_probs(table, hidden, TOKENS, MASK, TEMPERATURE, **form)
        return (jnp.stack(made) * WEIGHTS).sum(axis=0)

    close(on(mesh, chunked, TABLE, HIDDEN), whole(TABLE, HIDDEN))
    gradient = jax.grad(lambda *args: chunked(*args).sum(), (0, 1))
    close(on(mesh, gradient, TABLE, HIDDEN), jax.grad(lambda *args: whole(*args).sum(), (0, 1))(TABLE, HIDDEN))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("chunk", [1, 6, 100])
@pytest.mark.parametrize(("tied", "softcap"), FORMS)
def test_cross_entropy_and_its_gradient(tied, softcap, chunk, mesh):
    # the factor 1/3 stands for a normaliser that is only known later
    def whole(table, hidden):
        losses = smoothed_cross_entropy(logits(table, hidden, softcap), TOKENS, SMOOTHING)
        return jnp.where(MASK, losses, 0.0).sum() / 3.0

    def chunked(table, hidden):
        form = {"chunk": chunk, "tied": tied, "softcap": softcap}
        table = table if tied else table.T
        return vocabulary_cross_entropy(table, hidden, TOKENS, MASK, SMOOTHING, **form) / 3.0

    close(on(mesh, chunked, TABLE, HIDDEN), whole(TABLE, HIDDEN))
    got = on(mesh, jax.value_and_grad(chunked, (0, 1)), TABLE, HIDDEN)
    close(got, jax.value_and_grad(whole, (0, 1))(TABLE, HIDDEN))


@pytest.mark.parametrize("mesh", MESHES)
def test_how_often_the_likeliest_token_is_right(mesh):
    z = logits(TABLE, HIDDEN, None)
    likely = jnp.where(jnp.asarray(RNG.random((ROWS, LENGTH)) < 0.5), z.argmax(axis=-1), TOKENS).astype(jnp.int32)
    right = (np.asarray(z).argmax(axis=-1) == np.asarray(likely)) & np.asarray(MASK)
    got = on(mesh, partial(vocabulary_hits, chunk=4), TABLE, HIDDEN, likely, MASK)
    assert float(got) == right.sum() > 0


def test_without_targets_nothing_is_computed_and_nothing_learnt():
    nothing = jnp.zeros_like(MASK)

    def total(table):
        return vocabulary_cross_entropy(table, HIDDEN, TOKENS, nothing, chunk=4)

    loss, gradient = jax.value_and_grad(total)(TABLE)
    assert loss == 0
    assert (gradient == 0).all()


def test_half_precision_sums_in_float32():
    half = HIDDEN.astype(jnp.bfloat16)
    table = TABLE.astype(jnp.bfloat16).astype(jnp.float32)
    wanted = smoothed_cross_entropy(logits(table, half.astype(jnp.float32), None), TOKENS, 0.0)
    got = vocabulary_cross_entropy(TABLE, half, TOKENS, MASK, chunk=6)
    np.testing.assert_allclose(got, jnp.where(MASK, wanted, 0.0).sum(), rtol=1e-5)
    gradients = jax.grad(lambda t, h: vocabulary_cross_entropy(t, h, TOKENS, MASK, chunk=6), (0, 1))(TABLE, half)
    assert [g.dtype for g in gradients] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("function", [vocabulary_cross_entropy, vocabulary_log_probs])
def test_memory_of_the_loss_does_not_grow_with_the_logits(function):
    """2,048 tokens over 128,000 words: their logits are 1,049 MB in float32.

    Beyond the gradients themselves and their sum in the layout of the products, a tenth of that is enough.
    """
    tokens, width, words = 2048, 8, 128_000
    shapes = [(words, width), (1, tokens, width)]

    def loss(table, hidden, targets):
        made = function(table, hidden, targets, jnp.ones(targets.shape, bool), chunk=64)
        return made.sum() if function is vocabulary_cross_entropy else made[0].sum()

    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*abstract, targets).compile()
    extra = compiled.memory_analysis().temp_size_in_bytes - 4 * words * width
    assert extra < 0.1 * (4 * tokens * words)
