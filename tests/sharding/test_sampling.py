"""Sampling on eight devices: laid out as the rules say, nothing gathered for a token, and the tokens of one device."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import left_mask, params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, Speculation, generate
from rlhfjax.models import interface, sampling_weights
from rlhfjax.sharding import make_mesh, place_batch, state_shardings
from rlhfjax.sharding.sampling import SamplingLayout, sampling_layout, sampling_on
from rlhfjax.types import PromptBatch

SAMPLING = SamplingParams(max_new_tokens=5, stop_id=1, pad_id=0, stop_ids=(2, 3))
MESHES = {
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "sequence 4, tensor 2": {"data": 1, "sequence": 4, "tensor": 2},
}


def layout(**axes):
    return SamplingLayout(make_mesh(**axes))


def prompts_of(rows=8):
    lengths = [6, 1, 3, 2, 5, 3, 4, 6][:rows]
    return PromptBatch(random_tokens(rows, 6), left_mask(lengths, 6), jnp.arange(rows, dtype=jnp.int32))


def test_rows_take_every_axis_but_tensor_as_far_as_they_divide():
    mesh = layout(data=1, fsdp=2, sequence=2, tensor=2)
    assert mesh.axes("batch", 8) == ("fsdp", "sequence")
    assert mesh.axes("batch", 2) == ("fsdp",)
    assert mesh.axes("batch", 3) is None
    assert layout(data=2, fsdp=2, expert=2).axes("batch", 6) == ("data",)


def test_weights_lie_over_tensor_alone_and_caches_by_rows_and_heads():
    devices = layout(data=1, fsdp=4, tensor=2)
    params = {"unembed": {"kernel": 0}, "blocks": {"attention": {"key": {"kernel": 0}}, "mlp": {"down": {"kernel": 0}}}}
    shapes = [(2, 64, 2, 16), (2, 128, 64), (64, 512)]
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    specs = jax.tree.leaves(devices.weight_shardings(jax.tree.unflatten(jax.tree.structure(params), leaves)))
    assert [tuple(one.spec) for one in specs] == [
        (None, None, "tensor", None),
        (None, "tensor", None),
        (None, "tensor"),
    ]
    made = jax.jit(lambda x: devices.lay("cache", x))(jnp.zeros((8, 2, 16, 4)))
    assert made.sharding.shard_shape(made.shape) == (2, 1, 16, 4)
    made = jax.jit(lambda x: devices.lay("cache", x))(jnp.zeros((8, 3, 16, 4)))  # 3 heads for 2 devices
    assert made.sharding.shard_shape(made.shape) == (2, 3, 16, 4)


def drawn(model, mesh, sampling, samples=1, params=None):
    params = params_of(model) if params is None else params
    arguments = params, prompts_of(), jax.random.key(3)
    if mesh is not None:
        laid = jax.device_put(params, state_shardings(mesh, params)), place_batch(mesh, arguments[1])
        arguments = *laid, arguments[2]
        run = sampling_on(mesh, lambda *of: generate(model, *of, sampling, samples))
        return jax.device_get(jax.jit(run)(*arguments))
    return jax.device_get(jax.jit(lambda *of: generate(model, *of, sampling, samples))(*arguments))


DRAWS = {
    "plain": ({}, 1),
    "greedy in slots": ({"temperature": 0.0, "slots": 4}, 1),
    "likeliest of top k": ({"temperature": 0.7, "top_k": 20, "top_log_probs": 2}, 1),
    "slots": ({"slots": 4}, 1),
    "samples": ({}, 3),
    "guesses": ({"speculation": Speculation("ngram", 2)}, 1),
}


@cache
def on_one_device(draws):
    settings, samples = DRAWS[draws]
    return drawn(tiny("llama-gqa", layers=2), None, replace(SAMPLING, **settings), samples)


# How words are chosen depends on `tensor` alone, where rows lie on the mesh.
@pytest.mark.parametrize(
    ("mesh", "draws"),
    [("2 x 2 x 2", draws) for draws in ("greedy in slots", "likeliest of top k", "samples", "guesses")]
    + [("fsdp 8", "slots"), ("sequence 4, tensor 2", "plain")]
    + [
        pytest.param("fsdp 8", "samples", marks=pytest.mark.slow),
        *(pytest.param("sequence 4, tensor 2", draws, marks=pytest.mark.slow) for draws in ("slots", "guesses")),
    ],
)
def test_the_tokens_are_those_of_one_device(mesh, draws):
    settings, samples = DRAWS[draws]
    wanted = on_one_device(draws)
    made = drawn(tiny("llama-gqa", layers=2), make_mesh(**MESHES[mesh]), replace(SAMPLING, **settings), samples)
    np.testing.assert_array_equal(made.response, wanted.response)
    np.testing.assert_array_equal(made.response_mask, wanted.response_mask)
    np.testing.assert_allclose(made.sampled_log_probs, wanted.sampled_log_probs, rtol=1e-4, atol=1e-5)


def moved(text):
    """Elements of what collectives other than sums give, in compiled text."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


@pytest.mark.parametrize("scanned", [False, True])
def test_no_weight_moves_once_they_are_arranged(scanned, monkeypatch):
    # fails when weights lie as in training, or rows and heads are not where their caches are
    for module in (interface, sampling_weights):
        monkeypatch.setattr(module, "stacks_layers", lambda: scanned)
    mesh, model = make_mesh(data=1, fsdp=4, tensor=2), tiny("llama-gqa", width=64)
    params, devices = params_of(model), sampling_layout(make_mesh(data=1, fsdp=4, tensor=2))
    laid = jax.device_put(params, state_shardings(mesh, params))
    arranged = sampling_on(mesh, model.arrange)
    weights = jax.jit(arranged, out_shardings=devices.weight_shardings(jax.eval_shape(arranged, params)))(laid)
    run = jax.jit(sampling_on(mesh, lambda *of: generate(model, *of, SAMPLING)))
    arguments = place_batch(mesh, prompts_of()), jax.random.key(3)
    smallest = params["blocks"]["attention"]["key"]["kernel"][0].size
    text = run.lower(weights, *arguments).compile().as_text()
    assert "all-reduce" in text
    assert max(moved(text), default=0) < smallest
    wanted = jax.jit(lambda *of: generate(model, *of, SAMPLING))(params, prompts_of(), arguments[1])
    np.testing.assert_array_equal(run(weights, *arguments).response, wanted.response)
    in_training = run.lower(laid, *arguments).compile().as_text()  # arranged by the program itself: gathered in it
    assert max(moved(in_training)) >= smallest
