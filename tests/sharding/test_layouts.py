"""What programs compile to on a mesh: nothing is said by the compiler, and no loop moves what it should not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of

from rlhfjax import layout
from rlhfjax.config import schema
from rlhfjax.layout import laid_out_by
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.planning.hlo import Program
from rlhfjax.sharding import batch_sharding, make_mesh, put, state_shardings
from rlhfjax.sharding.activations import layout_of
from rlhfjax.stages.building import Vocabulary, build
from rlhfjax.target import target_of

WORDS, WIDTH = 320, 64
MESHES = {
    "three axes": {"data": 2, "fsdp": 2, "tensor": 2},
    "tokens": {"data": 2, "sequence": 2, "tensor": 2},
    "width": {"fsdp": 8},
    "width and words": {"fsdp": 2, "tensor": 4},
}


def programs(mesh, stage):
    """The programs of a small recipe's stage on such a mesh."""
    data, optimizer = [{"source": "unused.jsonl"}], {"lr": 1e-3, "clip_norm": 1.0}
    stages = {
        "sft": {"batch": {"size": 16, "length": 64}},
        "reward": {"batch": {"size": 16, "length": 64, "candidates": 3}, "normalize": {"on": "none"}},
        "ppo": {
            "batch": {"size": 16, "prompt_length": 24},
            "sampling": {"max_new_tokens": 16},
            "ptx": {"data": data, "coef": 1.0, "length": 40},
        },
    }
    stages = {name: {"data": data, "steps": 10, "optimizer": optimizer} | own for name, own in stages.items()}
    shape = {"family": "llama", "layers": 2, "width": WIDTH, "heads": 4, "kv_heads": 4, "context": 128}
    tokenizer = {"kind": "bpe", "vocab_size": WORDS, "data": data}
    run = schema.Run.model_validate(
        {"name": "small", "mesh": MESHES[mesh], "model": shape, "tokenizer": tokenizer, "stages": stages}
    )
    devices = make_mesh(**run.mesh.axes)
    return build(run, stage, devices, target_of(devices), Vocabulary(WORDS))


def compiled_in_silence(built, capfd):
    capfd.readouterr()
    with jax.numpy_dtype_promotion("standard"):  # optax widens
        texts = {name: program.lower().compile().as_text() for name, program in built.items()}
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert said == []  # XLA would say "Involuntary full rematerialization" here
    return texts


def rests_in_loops(text, at_most):
    """No collective of a loop gives more than so many bytes."""
    walked = Program(text).walked()
    inner = [one for loop, _ in walked.every() for one in loop.collectives if loop is not walked]
    assert [one for one in inner if one.result > at_most] == []
    return walked


# With tokens of a row apart, the gradient's sum is one with others; what moments over `data` update comes back.
@pytest.mark.parametrize(
    ("mesh", "kinds"), [("three axes", ["all_gather", "reduce_scatter"]), ("tokens", ["all_gather"])]
)
def test_the_table_of_words_is_gathered_once_and_its_gradient_reduced_once(mesh, kinds, capfd):
    # fails where a loop over the vocabulary gathers the table for each chunk, or reduces its gradient there
    text = compiled_in_silence(programs(mesh, "sft"), capfd)["step"]
    words = WORDS // MESHES[mesh]["tensor"]
    walked = rests_in_loops(text, words * WIDTH * 4 - 1)
    shapes = {f"f32[{words},{WIDTH}]", f"f32[{WIDTH},{words}]"}
    assert sorted(one.kind for one in walked.collectives if one.shape in shapes) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_compiler_has_nothing_to_say(mesh, stage, capfd):
    compiled_in_silence(programs(mesh, stage), capfd)


def test_tokens_are_looked_up_where_the_table_lies():
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(12, 8)).astype(np.float32), rng.integers(0, 12, (8, 6)).astype(np.int32)
    weights = rng.normal(size=(8, 6, 8)).astype(np.float32)
    wanted = np.zeros_like(table)
    np.add.at(wanted, tokens, weights)
    for axes in MESHES.values():
        mesh = make_mesh(**axes)
        with laid_out_by(layout_of(mesh)):
            here = layout.current()
            found, gradient = jax.jit(
                jax.value_and_grad(lambda t, here=here: (here.embedded(t, tokens, jnp.float32) * weights).sum())
            )(table)
            rows = jax.jit(lambda t, here=here: here.embedded(t, tokens, jnp.float32))(table)
        np.testing.assert_array_equal(rows, table[tokens])
        np.testing.assert_allclose(found, (table[tokens] * weights).sum(), rtol=1e-4)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_few_tokens_of_wide_layers_stay_in_their_rows(family):
    """Where tokens are fewer than a kernel is wide, XLA moves them to the kernel; over three axes not back (seen)."""
    model = LanguageModel(decoder_config(family, vocab_size=64, layers=2, width=64, heads=4, context=16))
    params = params_of(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, (16, 3)).astype(np.int32)
    places, segments = np.broadcast_to(np.arange(3, dtype=np.int32), (16, 3)), np.ones((16, 3), np.int32)
    wanted = jax.jit(model.hidden)(params, tokens, places, segments)
    for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "expert": 2}):
        mesh = make_mesh(**axes)
        laid = jax.device_put(params, state_shardings(mesh, params))
        rows = [put(array, batch_sharding(mesh)) for array in (tokens, places, segments)]
        with laid_out_by(layout_of(mesh)):
            found = jax.jit(model.hidden)(laid, *rows)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)  # sums over `tensor` are in another order


def test_an_activation_that_no_table_names_is_an_error():
    with laid_out_by(layout_of(make_mesh(data=8))):
        with pytest.raises(KeyError):
            layout.lay("nothing", jnp.zeros((8, 2)))
        with pytest.raises(ValueError, match="expected 3 axes of 'residual'"):
            layout.lay("residual", jnp.zeros((8, 2)))
