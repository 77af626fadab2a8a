"""Each kind of optimizer: a step worked out in numpy, its layout on a mesh, and a restart to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import lenient, params_of, ppo_config, random_tree, scalar_params_of, tiny

from rlhfjax.config.schema import Optimizer
from rlhfjax.models.lora import init_lora
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.sharding.rules import path_name
from rlhfjax.stages.online_programs import optimizer_of
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import abstract, init_state
from rlhfjax.training.update import apply_gradients

KINDS = Optimizer.model_fields["kind"].annotation.__args__
LR, DECAY = 0.01, 0.5


def updates(params, gradients, **settings):
    """What the steps of each gradient add, one after the other; no clipping if not asked for."""
    settings = {"lr": LR, "schedule": "constant", "clip_norm": None} | settings
    optimizer = lenient(make_optimizer(Optimizer(**settings), 10))
    step, state, made = jax.jit(optimizer.update), optimizer.init(params), []
    for gradient in gradients:
        change, state = step(gradient, state, params)
        made.append(jax.tree.map(lambda x: np.asarray(x, np.float64), change))
    return made


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_lion_steps_by_signs_and_remembers_with_another_beta():
    # m = 0: sign(g); then m = 0.01 g1, and at g2 = -0.05 g1: 0.9 * 0.01 - 0.1 * 0.05 > 0, so the sign stays
    params = {"layer": {"kernel": normal(3, 2)}}
    first = {"layer": {"kernel": normal(3, 2, seed=1)}}
    second = jax.tree.map(lambda g: -0.05 * g, first)
    got = updates(params, [first, second], kind="lion", b1=0.9, b2=0.99, weight_decay=DECAY)
    wanted = -LR * (np.sign(first["layer"]["kernel"]) + DECAY * np.asarray(params["layer"]["kernel"]))
    for step in got:  # fails when m moves by b1
        np.testing.assert_allclose(step["layer"]["kernel"], wanted, rtol=1e-5)


def test_adafactor_divides_by_the_product_of_row_and_column_means():
    shape = {"blocks": {"mlp": {"up": {"kernel": (2, 128, 160)}}}, "final_norm": {"scale": (7,)}}
    params, gradient = (
        jax.tree.map(lambda s, seed=seed: normal(*s, seed=seed), shape, is_leaf=lambda x: isinstance(x, tuple))
        for seed in (0, 1)
    )
    gradient["blocks"]["mlp"]["up"]["kernel"] *= 1 + jnp.arange(160.0)[None, None]  # columns of very different size
    [got] = updates(params, [gradient], kind="adafactor", weight_decay=DECAY)
    g = np.asarray(gradient["blocks"]["mlp"]["up"]["kernel"], np.float64)
    rows, columns = (g**2).mean(2, keepdims=True), (g**2).mean(1, keepdims=True)
    u = g / np.sqrt(rows * columns / rows.mean(1, keepdims=True))  # eq. of algorithm 4: R C / (1'R)
    u /= max(1.0, np.sqrt((u**2).mean()))
    kernel = np.asarray(params["blocks"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(got["blocks"]["mlp"]["up"]["kernel"], -LR * (u + DECAY * kernel), rtol=2e-4, atol=1e-7)
    scale = gradient["final_norm"]["scale"]  # not factored: g / |g|, and never decayed
    np.testing.assert_allclose(got["final_norm"]["scale"], -LR * np.sign(scale), rtol=1e-5)


def test_adafactor_factors_heads_and_their_width_as_one_axis():
    # fails when attention keeps a second moment of its own size, because no head is 128 wide
    params = {
        "blocks": {"attention": {"query": {"kernel": normal(2, 128, 4, 32)}, "out": {"kernel": normal(2, 4, 32, 128)}}}
    }
    state = make_optimizer(Optimizer(kind="adafactor", lr=LR), 10).init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.02 * sum(x.size for x in jax.tree.leaves(params))


MATRICES = {  # path in the decoder, and its axes as [layers, inputs, outputs]
    "attention/query": (2, 16, 16),
    "attention/key": (2, 16, 8),
    "attention/out": (2, 16, 16),
    "mlp/up": (2, 16, 48),
    "mlp/down": (2, 48, 16),
}


def test_muon_orthogonalises_every_matrix_of_every_layer_and_adam_takes_the_rest():
    params, gradient = params_of(tiny()), params_of(tiny(), seed=1)
    [got] = updates(params, [gradient], kind="muon", eps=1e-12)
    for path, shape in MATRICES.items():
        part, name = path.split("/")
        change = got["blocks"][part][name]["kernel"].reshape(shape) / (-LR * 0.2 * max(shape[1:]) ** 0.5)
        given = np.asarray(gradient["blocks"][part][name]["kernel"], np.float64).reshape(shape)
        for one, g in zip(change, given, strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            singular = np.diagonal(left.T @ one @ right.T)
            # fails when layers or heads are orthogonalised together; the band is that of five steps of the polynomial
            assert (singular > 0.6).all(), path
            assert (singular < 1.3).all(), path
            np.testing.assert_allclose((left * singular) @ right, one, atol=2e-3)
    for name in ("embed", "final_norm"):
        for g, change in zip(jax.tree.leaves(gradient[name]), jax.tree.leaves(got[name]), strict=True):
            np.testing.assert_allclose(change, -LR * np.sign(g), rtol=1e-4)


def test_muon_orthogonalises_adapters():
    params = params_of(tiny())
    adapters = init_lora(jax.random.key(0), params, 3, ["attention/(query|out)"])
    gradient = random_tree(adapters, seed=2)
    [got] = updates(adapters, [gradient], kind="muon")
    for name, a_shape, b_shape in (("query", (2, 16, 3), (2, 3, 16)), ("out", (2, 16, 3), (2, 3, 16))):
        for leaf, shape in (("lora_a", a_shape), ("lora_b", b_shape)):
            change = got["blocks"]["attention"][name][leaf].reshape(shape) / (LR * 0.2 * 4)
            singular = np.linalg.svd(change, compute_uv=False)
            assert ((singular > 0.6) & (singular < 1.3)).all(), (name, leaf)


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_decay_and_its_mask_hold_for_all(kind):
    params = scalar_params_of(tiny("gpt2"))
    still = jax.tree.map(jnp.zeros_like, params)
    shape = {"schedule": "linear", "warmup_steps": 2, "warmup_from": 0.5, "final": 1.0}
    got = updates(params, [still, still, still], kind=kind, weight_decay=DECAY, **shape)

    def check(path, before, *changes):
        matrix = path[-1].key in ("kernel", "embedding") and "head" not in str(path)
        for change, rate in zip(changes, (0.5, 0.75, 1.0), strict=True):
            np.testing.assert_allclose(change, -rate * LR * DECAY * before if matrix else 0 * before, rtol=1e-5)

    jax.tree_util.tree_map_with_path(check, params, *got)


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_clipping_comes_before_the_moments(kind):
    # second steps differ only by how much the first, huge gradient counts in the moments
    params = {"embed": {"embedding": normal(4, 3)}}
    huge = jax.tree.map(lambda x: 1e4 * jnp.ones_like(x), params)
    small = jax.tree.map(lambda x: -0.1 * jnp.ones_like(x), params)
    clipped = updates(params, [huge, small, small], kind=kind, clip_norm=0.01)[-1]
    free = updates(params, [huge, small, small], kind=kind, clip_norm=None)[-1]
    assert (clipped["embed"]["embedding"] > 0).all()
    assert (free["embed"]["embedding"] < 0).all()


@pytest.mark.parametrize("kind", ["adamw_bf16", "lion_bf16", "muon_bf16"])
def test_first_moments_in_bfloat16_change_little(kind):
    params = params_of(tiny())
    gradients = [params_of(tiny(), seed=seed) for seed in (1, 2, 3)]
    optimizer = make_optimizer(Optimizer(kind=kind, lr=LR), 10)
    types = {
        str(x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(optimizer.init(params)) if "mu" in str(path)
    }
    assert types == {"bfloat16"}
    short = updates(params, gradients, kind=kind)[-1]
    long = updates(params, gradients, kind=kind.removesuffix("_bf16"))[-1]
    for one, other in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        assert (np.abs(one - other) > 0.02 * np.abs(other).max()).mean() < 0.02


# On a mesh -----------------------------------------------------------------------------------------------------------

WIDE = tiny(vocab_size=128, layers=2, width=128, heads=4, mlp_width=256)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 2, 1, 2)


def start_of(mesh, kind):
    optimizer = lenient(optimizer_of(ppo_config(optimizer={"lr": LR, "kind": kind})))
    params = {"policy": params_of(WIDE, std=0.1), "value": scalar_params_of(WIDE, std=0.1)}
    state = init_state(mesh, params, optimizer)
    moved = jax.jit(lambda s, g: apply_gradients(optimizer, s, g), out_shardings=state_shardings(mesh, state))
    gradients = [
        {"policy": params_of(WIDE, seed=seed), "value": scalar_params_of(WIDE, seed=seed)} for seed in range(1, 4)
    ]
    return state, moved, gradients


@pytest.mark.parametrize("kind", ["adafactor", "lion_bf16", "muon"])
def test_state_lies_by_the_rules_and_a_restart_goes_on_to_the_bit(mesh, kind, tmp_path):
    state, moved, (first, second, third) = start_of(mesh, kind)
    state = moved(moved(state, first), second)
    specs = {path_name(path): x.sharding.spec for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer)}
    kernels = [spec for name, spec in specs.items() if name.endswith("mu/policy/blocks/mlp/up/kernel")]
    assert kernels == ([] if kind == "adafactor" else [P(None, ("fsdp", "data"), "tensor")])
    assert all(spec == P() for name, spec in specs.items() if "/v_row/" in name or "ns_coeffs" in name)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    training = (state.optimizer, state.step)
    checkpoints.save(2, dict(state.params), training, {})
    models, (optimizer_state, step), _ = checkpoints.restore(2, abstract(dict(state.params)), abstract(training))
    checkpoints.close()
    straight = moved(state, third)
    again = moved(type(state)(models, optimizer_state, step, None), third)
    one, other = jax.tree.leaves(straight), jax.tree.leaves(again)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, other, strict=True))


def test_one_device_and_eight_take_the_same_muon_step(mesh):
    state, moved, (first, *_) = start_of(mesh, "muon")
    params = {"policy": params_of(WIDE, std=0.1), "value": scalar_params_of(WIDE, std=0.1)}
    optimizer = lenient(optimizer_of(ppo_config(optimizer={"lr": LR, "kind": "muon"})))
    change, _ = jax.jit(optimizer.update)(first, optimizer.init(params), params)
    wanted = optax.apply_updates(params, change)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), moved(state, first).params, wanted)
