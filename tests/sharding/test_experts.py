"""A mixture of experts is the same in one part or four, and on every mesh, `expert` axis or not.

Rows differ in length and targets, so nothing but sums over the whole batch comes out the same.
"""

import jax
import numpy as np
import pytest
from tiny import SHAPE, assert_equal_gradients, params_of, token_batch

from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.sharding import make_mesh, place_batch, state_shardings
from rlhfjax.stages.objectives import training_loss
from rlhfjax.training.update import gradients


def model(capacity_factor=None):
    routers = {"experts": 4, "load_balancing_coef": 0.3, "router_z_coef": 0.1, "capacity_factor": capacity_factor}
    return LanguageModel(decoder_config("mixtral", **SHAPE, kv_heads=2, **routers))


MODELS = {"dropless": model(), "bounded": model(capacity_factor=0.75)}
MESHES = {
    "one": ((1, 1, 1, 1, 1), 1),
    "one, 4 parts": ((1, 1, 1, 1, 1), 4),
    "expert 4": ((1, 1, 1, 1, 4), 1),
    "fsdp 2, tensor 2, expert 2, 2 parts": ((1, 2, 1, 2, 2), 2),
}


def all_gradients(shape, parts):
    """(gradients, metrics) of both models on a mesh, as numpy."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    params = params_of(MODELS["dropless"])
    params = jax.device_put(params, state_shardings(mesh, params))

    @jax.jit
    def run(params, batch, keys):
        models = zip(MODELS.items(), keys, strict=True)
        return {name: gradients(training_loss(model), params, batch, key, parts) for (name, model), key in models}

    keys = list(jax.random.split(jax.random.key(0), 2))
    return jax.device_get(run(params, place_batch(mesh, token_batch(8, 12)), keys))


@pytest.fixture(scope="module")
def reference():
    return all_gradients(*MESHES["one"])


# fails when each part is balanced by its own counts: seen
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_losses_and_gradients_do_not_depend_on_parts_or_mesh(mesh, reference):
    got = all_gradients(*MESHES[mesh])
    for name, (wanted_grads, wanted) in reference.items():
        grads, metrics = got[name]
        for metric, value in wanted.items():
            np.testing.assert_allclose(metrics[metric], value, rtol=2e-5, atol=1e-6, err_msg=f"{name} {metric}")
        assert_equal_gradients(grads, wanted_grads, name)


def test_the_batch_is_unbalanced_and_some_of_it_dropped(reference):
    assert reference["dropless"][1]["router/dropped"] == 0.0
    assert 0.02 < reference["bounded"][1]["router/dropped"] < 0.5
    assert reference["bounded"][1]["loss/train"] != reference["dropless"][1]["loss/train"]
    assert reference["dropless"][1]["router/max_load"] > 1.2


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient(reference, name):
    for path, leaf in jax.tree_util.tree_flatten_with_path(reference[name][0])[0]:
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_experts_lie_on_their_axis():
    mesh = make_mesh(1, 2, 1, 1, 4)
    shapes = jax.eval_shape(MODELS["dropless"].init, jax.random.key(0))
    up = state_shardings(mesh, shapes)["blocks"]["experts"]["up"]["kernel"]
    assert up.shard_shape(shapes["blocks"]["experts"]["up"]["kernel"].shape) == (2, 1, 8, 48)
