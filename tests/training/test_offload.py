"""Moments and averages in the host's memory: the bits of an update with them on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import lenient, params_of, random_tokens, random_tree, tiny

from rlhfjax.config.schema import Optimizer
from rlhfjax.host_memory import HOST
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.stages.objectives import language_modelling
from rlhfjax.training.averaging import Average
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.digests import leaf_digests
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import init_state, init_state_shapes
from rlhfjax.training.update import offline_step
from rlhfjax.types import TokenBatch

MODEL = tiny(width=16, heads=2)
BATCH_ROWS = 8
MESHES = {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])


def batch():
    tokens = random_tokens(BATCH_ROWS, 12, seed=4)
    return TokenBatch(
        tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(12), (BATCH_ROWS, 1)), jnp.ones(tokens.shape, bool)
    )


def stepper(mesh, kind, offload):
    """A fresh state and the jitted step on it, as a stage has them."""
    optimizer = lenient(make_optimizer(Optimizer(lr=0.01, kind=kind, weight_decay=0.1), 10))
    average = Average(0.9)
    state = init_state(mesh, params_of(MODEL, std=0.3), optimizer, average.of, offload)
    objective = language_modelling(MODEL)

    def step(state, key):
        return offline_step(objective, optimizer, state, batch(), key, kept=average)[0]

    return state, jax.jit(step, donate_argnums=0, out_shardings=state_shardings(mesh, state))


def places(state):
    """Memory kinds of the arrays of what only an update reads, but for counts."""
    return {x.sharding.memory_kind for x in jax.tree.leaves((state.optimizer, state.average)) if x.ndim}


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon_bf16"])
@pytest.mark.parametrize("name", MESHES)
def test_the_bits_are_the_same(name, kind):
    # meant to catch moments that are not put back, or that a step computes in another order
    mesh, ends = mesh_of(name), []
    for offload in (False, True):
        state, step = stepper(mesh, kind, offload)
        for seed in range(3):
            state = step(state, jax.random.key(seed))
        assert places(state) == ({HOST} if offload else {"device"})
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
        ends.append(state)
    assert_same(*ends)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_is_read_into_either_memory_and_its_digests_hold(tmp_path, name, offload):
    mesh = mesh_of(name)
    state, _ = stepper(mesh, "adamw", not offload)
    filled = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), random_tree(state.average), state.average)
    kept = Checkpoints(tmp_path, 1)
    training = {"optimizer": state.optimizer, "average": filled}
    digests = leaf_digests(training)
    kept.save(1, {"policy": state.params}, training, {})
    optimizer = lenient(make_optimizer(Optimizer(lr=0.01), 10))
    shapes = init_state_shapes(mesh, state.params, optimizer, lambda params: params, offload)
    wanted = {"optimizer": shapes.optimizer, "average": shapes.average}
    models, read, _ = kept.restore(1, {"policy": shapes.params}, wanted)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(read) if x.ndim} == {HOST if offload else "device"}
    assert leaf_digests(read) == digests
    assert_same((models["policy"], read), (state.params, training))
    kept.close()
