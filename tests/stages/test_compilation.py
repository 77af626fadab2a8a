"""Programs are compiled in threads for what they will be called with, and never twice."""

from dataclasses import replace
from math import prod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import load_config
from rlhfjax.sharding import make_mesh
from rlhfjax.stages import compilation
from rlhfjax.stages.building import Vocabulary, build
from rlhfjax.stages.compilation import Ahead, knows, step_options
from rlhfjax.target import building_for, current, machine, target_of
from rlhfjax.training.online import OnlineSteps
from rlhfjax.types import OnlineState, TrainState


@pytest.fixture
def compiled():
    """Names of what was compiled since the test began."""
    names = []

    def listen(event, seconds, **more):
        if event.endswith("backend_compile_duration"):
            names.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_program_made_ahead_is_the_one_that_is_called(compiled):
    double = jax.jit(lambda scale, x: scale * x, donate_argnums=1)
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    inputs = jnp.ones(3), jnp.ones(3), jnp.ones(4), jnp.float32(2.0)
    ahead = Ahead("ppo")
    program = ahead.program(jax.tree_util.Partial(double, inputs[3]), shape)
    assert program.shapes() == shape
    program.ready.result()
    compiled.clear()
    assert program(inputs[0]).tolist() == program(inputs[1]).tolist() == [2, 2, 2]
    assert compiled == []
    assert program(inputs[2]).tolist() == [2, 2, 2, 2]  # another shape is no error
    assert len(compiled) == 1
    assert "ppo: compiled in" in ahead.first_step()
    assert set(ahead.facts) == {"timing/compile_s", "timing/first_step_s"}


def test_a_program_is_traced_for_the_target_of_the_thread_that_wants_it(compiled):
    # fails where the threads that trace have the machine's own: compiled anew at the call
    scaled = jax.jit(lambda x: x * current().blocks)
    x = jnp.ones(3)
    with building_for(replace(machine(), blocks=7)):
        program = Ahead("ppo").program(scaled, x)
        program.ready.result()
        compiled.clear()
        assert program(x).tolist() == [7, 7, 7]
        assert compiled == []


def test_an_error_of_a_program_comes_from_its_call():
    program = Ahead("ppo").program(jax.jit(lambda x: x @ jnp.ones((4, 4))), jnp.ones(3))
    with pytest.raises(TypeError, match="dot_general"):
        program(jnp.ones(3))


def test_each_step_of_an_iteration_is_made_for_what_the_one_before_gives(compiled):
    key, prompts, ones = jax.random.key(0), jnp.arange(3.0), jnp.ones((2, 3))
    state = OnlineState(TrainState({"w": jnp.ones((3, 5))}, (), jnp.int32(0)), jnp.float32(0.5), jnp.int32(0))
    steps = OnlineSteps(
        rollout=jax.jit(lambda params, prompts, key: prompts[None] + jax.random.uniform(key, (4, 3))),
        score=jax.jit(lambda params, frozen, rollout: rollout @ (params["w"] + frozen)),
        estimate=jax.jit(lambda rollout, coef: (rollout.T, {"kl": coef * rollout.sum()})),
        update=jax.jit(lambda state, learned, extra, measured, key: (state, measured | {"n": learned.sum()})),
        reshard=jax.jit(lambda params: params),
    )
    made = Ahead("ppo").online(steps, state, jnp.ones((3, 5)), prompts, ones)
    for step in (made.reshard, made.rollout, made.score, made.estimate, made.update):
        step.ready.result()
    frozen = jnp.ones((3, 5))
    compiled.clear()
    rollout = made.score(state.train.params, frozen, made.rollout(made.reshard(state.train.params), prompts, key))
    learned, measured = made.estimate(rollout, state.kl_coef)
    assert set(made.update(state, learned, ones, measured, key)[1]) == {"kl", "n"}
    assert compiled == []


def mesh_of(**axes):
    return make_mesh(**axes, devices=jax.devices()[: prod(axes.values())])


def parameters(count):
    return {"kernel": jax.ShapeDtypeStruct((count // 2, 2), jnp.float32)}


def test_small_models_on_devices_that_a_cpu_pretends_to_have_are_compiled_quickly():
    # fails when a single device, a model that takes its time or a process with one device gets worse programs, too
    several = mesh_of(data=1, fsdp=8)
    quick = step_options(several, parameters(1_000_000))
    assert quick
    assert quick["xla_backend_optimization_level"] == 0
    assert step_options(several, (parameters(600_000), parameters(600_000))) is None
    assert step_options(mesh_of(data=1), parameters(8)) is None
    processes = [SimpleNamespace(platform="cpu", process_index=index) for index in range(2)]
    assert step_options(SimpleNamespace(devices=np.array(processes)), parameters(8)) is None


def test_options_that_a_compiler_lacks_are_left_out():
    # fails if an error of the compiler is raised, or is taken for want of the option
    device = jax.devices()[0]
    assert knows(device, "xla_backend_optimization_level", "1")
    assert not knows(device, "xla_no_such_option", "true")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_backend_optimization_level"):
        knows(device, "xla_backend_optimization_level", "much")


@pytest.mark.parametrize(("stage", "programs"), [("sft", ["step"]), ("ppo", ["score", "update"])])
def test_steps_are_compiled_with_these_options(stage, programs, config, monkeypatch):
    monkeypatch.setattr(compilation, "QUICK", {"xla_no_such_option": 1})
    monkeypatch.setattr(compilation, "refused", lambda flags: [])
    mesh = mesh_of(data=1, fsdp=2)
    built = build(load_config(config), stage, mesh, target_of(mesh), Vocabulary(320))
    for name in programs:
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            built[name].lower().compile()
