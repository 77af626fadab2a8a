"""Loss and gradient are the same in one part or eight, and on every mesh of eight devices.

Rows differ in their number of targets from 1 to all: a mean of means would be far off.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    assert_equal_gradients,
    experience,
    params_of,
    ppo_config,
    ranked_batch,
    scalar_params_of,
    tiny,
    token_batch,
)

from rlhfjax.algorithms.objective import MixedBatch
from rlhfjax.algorithms.packing import packed_experience
from rlhfjax.config import schema
from rlhfjax.layout import laid_out_by
from rlhfjax.sharding import batch_sharding, constrain_parts, make_mesh, place_batch, state_shardings
from rlhfjax.sharding.activations import layout_of
from rlhfjax.stages.objectives import language_modelling, reward_modelling
from rlhfjax.stages.ppo import ppo_objective
from rlhfjax.training.update import gradients

ROWS, COEF = 16, 2.5
POLICY, SCALAR = tiny("llama-gqa", tied=False), tiny("gpt2")
CONFIG = ppo_config(loss={"entropy_coef": 0.1}, ptx={"coef": COEF, "data": [{"source": "unused"}], "length": 8})


ALGORITHMS = {
    "language_modelling": language_modelling(POLICY),
    "reward_modelling": reward_modelling(SCALAR, schema.RankingLoss()),
    "ppo_ptx": ppo_objective(CONFIG, POLICY, SCALAR),
}
PPO_PTX = ALGORITHMS["ppo_ptx"]
# Language modelling is a part of the mix, with a loss of its own in the metrics and a share of every gradient; what of
# rankings lies apart are rows and tokens.
RANKED = ("one, 8 parts", "fsdp 8", "data 2, sequence 2, tensor 2, 4 parts")
# Each is a part of another one, or of the whole recipe on 2 x 2 x 2 in tests/stages/test_devices.py.
SLOW = ("fsdp 8", "data 2, fsdp 2, tensor 2", "data 2, sequence 4")
LOSSES = {
    "language_modelling": ("loss/train",),
    "reward_modelling": ("train/rm/loss", "train/rm/accuracy"),
    "ppo_ptx": (
        "loss/policy_avg",
        "loss/value_avg",
        "loss/ptx",
        "policy/entropy_avg",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "val/ratio",
        "grad/ptx_to_ppo_norm_ratio",
    ),
}
MESHES = {
    "one": ((1, 1, 1, 1), 1),
    "one, 8 parts": ((1, 1, 1, 1), 8),
    "fsdp 8": ((1, 8, 1, 1), 1),
    "two slices of fsdp 4": ((2, 4, 1, 1), 1),
    "data 2, fsdp 2, tensor 2": ((2, 2, 1, 2), 1),
    "data 2, tensor 4, more than key heads": ((2, 1, 1, 4), 1),
    "tensor 3, which divides no size": ((1, 1, 1, 3), 1),
    "data 2, sequence 2, tensor 2, 4 parts": ((2, 1, 2, 2), 4),
    "data 2, sequence 4": ((2, 1, 4, 1), 1),
}


def all_gradients(shape, parts, **algorithms):
    """(gradients, metrics) of algorithms, by default all of them, on a mesh, as numpy."""
    algorithms = algorithms or ALGORITHMS
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    params = {"policy": params_of(POLICY, std=0.15), "value": scalar_params_of(SCALAR, std=0.15)}
    params = jax.device_put(params, state_shardings(mesh, params))
    tokens = place_batch(mesh, token_batch(ROWS, 8))
    ranked = place_batch(mesh, ranked_batch(ROWS, 3, 8))
    made = jax.device_put(experience(ROWS, 5, 6), batch_sharding(mesh))

    pack = partial(packed_experience, ROWS // parts, place=partial(constrain_parts, mesh))

    @jax.jit
    def run(params, tokens, ranked, made, key):
        batches = {
            "language_modelling": (params["policy"], tokens),
            "reward_modelling": (params["value"], ranked),
            "ppo": (params, made),
            "ppo_ptx": (params, MixedBatch(made, tokens)),
        }
        keys = list(jax.random.split(key, len(algorithms)))
        return {
            name: gradients(algorithm, *batches[name], key, parts, pack if name.startswith("ppo") else None)
            for key, (name, algorithm) in zip(keys, algorithms.items(), strict=True)
        }

    with laid_out_by(layout_of(mesh)):
        return jax.device_get(run(params, tokens, ranked, made, jax.random.key(0)))


@pytest.fixture(scope="module")
def reference():
    return all_gradients(*MESHES["one"])


# meant to catch every part (or device) being normalised by its own count
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MESHES if name != "one"],
)
def test_loss_and_gradient_do_not_depend_on_parts_or_mesh(mesh, reference):
    asked = ("reward_modelling", "ppo_ptx") if mesh in RANKED else ("ppo_ptx",)
    got = all_gradients(*MESHES[mesh], **{name: ALGORITHMS[name] for name in asked})
    for name in asked:
        (grads, metrics), (wanted_grads, wanted) = got[name], reference[name]
        for metric in LOSSES[name]:
            np.testing.assert_allclose(
                metrics[metric], wanted[metric], rtol=2e-5, atol=1e-6, err_msg=f"{name} {metric}"
            )
        assert_equal_gradients(grads, wanted_grads, name)


def test_every_gradient_is_there(reference):
    for name, (grads, _) in reference.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
            assert np.isfinite(leaf).all(), (name, path)
            # a key bias moves all scores of a query alike, which the softmax undoes
            if "'key'" not in str(path) or "bias" not in str(path):
                assert np.abs(leaf).max() > 0, (name, path)


def test_the_mixed_gradient_is_the_sum_of_the_two(reference):
    # meant to catch a coefficient that is lost, or that multiplies the value model's gradient too
    ppo = all_gradients(*MESHES["one"], ppo=PPO_PTX.first)["ppo"][0]
    language = reference["language_modelling"][0]
    mixed, metrics = reference["ppo_ptx"]
    wanted = {"policy": jax.tree.map(lambda a, b: a + COEF * b, ppo["policy"], language), "value": ppo["value"]}
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-6), mixed, wanted)

    def norm(tree):
        return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))

    ratio = COEF * norm(language) / norm(ppo["policy"])
    np.testing.assert_allclose(metrics["grad/ptx_to_ppo_norm_ratio"], ratio, rtol=1e-4)


def test_the_clip_is_active_on_part_of_the_tokens(reference):
    assert 0.05 < reference["ppo_ptx"][1]["policy/clipfrac_avg"] < 0.95
    assert jnp.isfinite(reference["ppo_ptx"][1]["val/ratio"])
