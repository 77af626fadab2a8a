"""What is saved comes back bit for bit, in its layout; what cannot be read is an expected error."""

import base64
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import lenient, params_of, ppo_config, random_tokens, scalar_params_of, tiny

from rlhfjax.config.recipe import STAGES
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.host import processes
from rlhfjax.integrity import unverified
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.stages.online_programs import optimizer_of
from rlhfjax.text.loading import load_tokenizer
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.averaging import Average
from rlhfjax.training.checkpoint import Checkpoints, find_checkpoint, load_model, meta_of, read_meta, tokenizer_of
from rlhfjax.training.state import abstract, init_state
from rlhfjax.training.update import apply_gradients

MODEL = tiny("llama-gqa", vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the movie was good", "a bad film, and a long one"] * 20, 300)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 2, 1, 2)


@pytest.fixture(scope="module")
def state(mesh):
    """A state on eight devices after one step, so that moments and average are their own numbers."""
    optimizer = lenient(optimizer_of(ppo_config()))
    params = {"policy": params_of(MODEL), "value": scalar_params_of(MODEL, seed=1)}
    fresh = init_state(mesh, params, optimizer, lambda params: params["policy"])
    layout = state_shardings(mesh, fresh)
    average = Average(0.9, lambda params: params["policy"])
    moved = jax.jit(lambda s, g: apply_gradients(optimizer, s, g, average), out_shardings=layout)
    return moved(fresh, {"policy": params_of(MODEL, seed=2), "value": scalar_params_of(MODEL, seed=3)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state, tokenizer):
    """A stage directory with steps 3 and 7."""
    stage = tmp_path_factory.mktemp("run") / "ppo"
    checkpoints = Checkpoints(stage / "checkpoints", keep=2)
    for step in (3, 7):
        checkpoints.save(step, models_of(state), training_of(state), meta_of("policy", MODEL, tokenizer, facts=None))
    checkpoints.close()
    return stage


def models_of(state):
    return {"policy": state.params["policy"], "value": state.params["value"], "average": state.average}


def training_of(state):
    return (state.optimizer, state.step, jnp.float32(0.123), jnp.int32(7))


def assert_same(got, wanted):
    """Equal bits, types and structure."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_fresh_state_has_the_layout_of_the_rules(mesh):
    optimizer = optimizer_of(ppo_config())
    params = {"policy": params_of(MODEL), "value": scalar_params_of(MODEL)}
    params = jax.device_put(params, state_shardings(mesh, params))
    fresh = init_state(mesh, params, optimizer)
    assert fresh.average is None
    assert_same(fresh.params, params)
    for leaf, wanted in zip(jax.tree.leaves(fresh), jax.tree.leaves(state_shardings(mesh, fresh)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    embedding = fresh.params["policy"]["embed"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (150, 8)  # vocabulary over tensor, width over fsdp


def test_everything_comes_back_bit_for_bit_in_its_layout(saved, state):
    # meant to catch an item that is left out of save or restore, or comes back on another layout
    checkpoints = Checkpoints(saved / "checkpoints", keep=2)
    assert checkpoints.latest() == 7
    models, training, meta = checkpoints.restore(7, abstract(models_of(state)), abstract(training_of(state)))
    checkpoints.close()
    assert_same(models, models_of(state))
    assert_same(training, training_of(state))
    wanted = jax.tree.leaves((models_of(state), training_of(state)))
    for leaf, original in zip(jax.tree.leaves((models, training)), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(original.sharding, leaf.ndim)
    assert (meta["step"], meta["facts"], meta["serve"]) == (7, None, "policy")


def test_another_mesh_reads_the_same_numbers(saved, state):
    # saved on 2 x 2 x 1 x 2 devices
    other = make_mesh(1, 4, 1, 1, devices=jax.devices()[4:])
    model, params = load_model(saved / "checkpoints" / "7", other, item="value")
    assert model.config == MODEL.config
    assert_same(jax.device_get(params), jax.device_get(state.params["value"]))
    assert params["decoder"]["embed"]["embedding"].sharding.mesh == other
    plain = load_model(saved / "checkpoints" / "7")[1]
    assert_same(jax.device_get(plain), jax.device_get(state.params["policy"]))
    assert {device for leaf in jax.tree.leaves(plain) for device in leaf.devices()} == {jax.devices()[0]}


def test_how_a_model_computes_is_chosen_when_it_is_loaded(saved):
    with jax.numpy_dtype_promotion("standard"):  # the norms of Flax promote
        model, _ = load_model(saved / "checkpoints" / "7", item="average", dtype="bfloat16", remat="full")
    assert (model.config.dtype, model.config.remat) == ("bfloat16", "full")


def test_meta_holds_the_tokenizer(saved, tokenizer):
    found = tokenizer_of(read_meta(saved / "checkpoints" / "7"))
    assert found.fingerprint == tokenizer.fingerprint
    assert found.encode("a good film") == tokenizer.encode("a good film")


def test_meta_holds_any_tokenizer_or_none(tokenizer):
    published = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizers" / "byte_level")
    for one in (tokenizer, published):
        found = tokenizer_of(json.loads(json.dumps(meta_of("policy", MODEL, one))))
        assert (found.kind, found.fingerprint) == (one.kind, one.fingerprint)
    assert tokenizer_of(meta_of("policy", MODEL, None)) is None
    # As checkpoints held it before there were two kinds.
    older = {"tokenizer": base64.b64encode(tokenizer.to_bytes()).decode()}
    assert tokenizer_of(older).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("packed", ["?", {}, {"kind": "sentencepiece", "data": "aGk="}, {"kind": "x", "data": ""}, 3])
def test_a_broken_tokenizer_in_meta(packed):
    with pytest.raises(IntegrityError):
        tokenizer_of({"tokenizer": packed})


def steps_of(directory):
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


@pytest.mark.parametrize(
    ("keep", "best", "scores", "kept", "chosen"),
    [
        (1, False, [None, None, None], [3], 3),
        (2, False, [None, None, None], [2, 3], 3),
        (1, True, [0.5, 0.9, 0.1, 0.3], [2, 4], 2),
        (2, True, [-0.9, -0.5, -0.7, -0.6], [2, 3, 4], 2),
        (1, True, [0.2, 0.9, None], [2, 3], 2),
        (1, True, [0.2, math.nan, 0.1], [1, 3], 1),  # NaN is no highest score, and no lowest one if it is alone
        (1, True, [math.nan, math.nan], [2], 2),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, best, scores, kept, chosen):
    # meant to catch lower scores that win, and a best one that is dropped
    checkpoints = Checkpoints(tmp_path, keep, keep_best=best)
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, {"policy": {"x": jnp.full(2, step)}}, (jnp.int32(step),), {}, score)
    if best:
        assert checkpoints.best() == chosen
    assert checkpoints.latest() == len(scores)
    checkpoints.close()
    assert steps_of(tmp_path) == kept
    again = Checkpoints(tmp_path, keep, keep_best=best)
    assert (again.latest(), again.best() if best else chosen) == (len(scores), chosen)
    again.close()


def test_a_run_stands_for_the_last_of_its_policies(tmp_path):
    for facts in STAGES:  # in the order of the recipe
        (tmp_path / facts.name / "checkpoints" / "5").mkdir(parents=True)
        if facts.role == "policy":
            assert find_checkpoint(tmp_path) == tmp_path / facts.name / "checkpoints" / "5"
            last = facts.name
    assert find_checkpoint(tmp_path).parts[-3] == last


def test_an_empty_directory_has_no_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", keep=1)
    assert checkpoints.latest() is None
    checkpoints.close()


def test_paths_of_steps_stages_and_runs(saved, tmp_path):
    step = saved / "checkpoints" / "7"
    assert find_checkpoint(step) == find_checkpoint(saved) == find_checkpoint(str(saved.parent)) == step
    run = tmp_path / "run"
    shutil.copytree(saved, run / "sft")
    assert find_checkpoint(run) == run / "sft" / "checkpoints" / "7"
    (run / "sft" / "complete.json").write_text(json.dumps({"step": 3}))  # a stage that chose an earlier step
    assert find_checkpoint(run) == find_checkpoint(run / "sft") == run / "sft" / "checkpoints" / "3"
    shutil.copytree(saved, run / "reward")
    assert find_checkpoint(run) == run / "sft" / "checkpoints" / "3"  # a run's policy, not its reward model
    (run / "ppo" / "checkpoints").mkdir(parents=True)
    assert find_checkpoint(run) == run / "sft" / "checkpoints" / "3"  # a stage that has saved nothing yet
    shutil.copytree(saved / "checkpoints" / "7", run / "ppo" / "checkpoints" / "5")
    assert find_checkpoint(run) == run / "ppo" / "checkpoints" / "5"
    (run / "ppo" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # what a killed save leaves
    assert find_checkpoint(run / "ppo") == run / "ppo" / "checkpoints" / "5"


@pytest.mark.parametrize("path", ["nothing", "empty", "file"])
def test_no_checkpoint_is_a_configuration_error(tmp_path, path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"checkpoint: .*{path}"):
        find_checkpoint(tmp_path / path)


def files_of(item):
    return [path for path in item.rglob("*") if path.is_file() and path.stat().st_size]


def emptied(item):
    for path in files_of(item):
        path.write_bytes(b"")


def garbled(item):
    noise = np.random.default_rng(0)
    for path in files_of(item):
        path.write_bytes(noise.bytes(path.stat().st_size))


def halved(item):
    for path in files_of(item):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_arrays(item):
    for path in files_of(item):
        if path.name not in ("_METADATA", "_sharding"):
            path.unlink()


DAMAGE = [shutil.rmtree, emptied, garbled, halved, without_arrays]


@pytest.fixture
def unchecked():
    """Reads as with --no-verify: what Orbax and JSON say of damaged files is an expected error too."""
    with unverified():
        yield


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "ppo")
    return tmp_path / "ppo" / "checkpoints" / "7"


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_model_that_cannot_be_read_is_an_integrity_error(unchecked, copied, damage):
    damage(copied / "policy")
    with pytest.raises(IntegrityError, match=r"7 has no readable item 'policy'"):
        load_model(copied)
    load_model(copied, item="value")  # the others can still be read


@pytest.mark.parametrize("damage", DAMAGE[:4], ids=lambda f: f.__name__)
def test_meta_that_cannot_be_read_is_an_integrity_error(unchecked, copied, damage):
    damage(copied / "meta")
    with pytest.raises(IntegrityError, match=r"7 has no readable meta"):
        read_meta(copied)


@pytest.mark.parametrize("item", ["policy", "average", "training", "meta"])
@pytest.mark.parametrize("damage", [shutil.rmtree, garbled, without_arrays], ids=lambda f: f.__name__)
def test_a_step_that_cannot_be_restored_is_an_integrity_error(unchecked, copied, state, item, damage):
    damage(copied / item)
    checkpoints = Checkpoints(copied.parent, keep=2)
    with pytest.raises(IntegrityError, match=r"checkpoint .*7 (cannot be read|has no readable meta)"):
        checkpoints.restore(7, abstract(models_of(state)), abstract(training_of(state)))
    checkpoints.close()


def test_a_model_of_another_shape_is_an_integrity_error(unchecked, copied):
    item = copied / "meta"
    path = next(path for path in files_of(item) if b"vocab_size" in path.read_bytes())
    meta = json.loads(path.read_text())
    meta["model"]["width"] = 24
    path.write_text(json.dumps(meta))
    with pytest.raises(IntegrityError, match="'policy'"):
        load_model(copied)


def test_a_loaded_model_computes_what_the_saved_one_did(saved, state):
    tokens = random_tokens(2, 5, high=300)
    everything = jnp.ones((2, 5), bool)
    model, params = load_model(find_checkpoint(saved))
    forward = jax.jit(model.logits)
    np.testing.assert_array_equal(
        forward(params, tokens, everything), forward(jax.device_get(state.params["policy"]), tokens, everything)
    )


def test_the_keyboard_waits_for_a_save(tmp_path, monkeypatch):
    # fails when Ctrl-C is let through to Orbax, which then logs a failed save: seen
    checkpoints, done = Checkpoints(tmp_path, keep=1), []

    def slow(presses):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        done.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(checkpoints._saver, "close", lambda: slow(1))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
        assert done == [True]
        monkeypatch.setattr(checkpoints._saver, "close", lambda: slow(2))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
        assert done == [True]  # the second time it does not wait
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    checkpoints.close()


@pytest.mark.parametrize("late", [False, True], ids=["the first process", "one that comes late"])
def test_steps_that_a_rollback_leaves_go_in_one_turn(tmp_path, monkeypatch, late):
    """Processes take as many turns as each other, also one that looks when the first has deleted some of them."""
    for step in (2,) if late else (2, 4, 6):
        (tmp_path / str(step)).mkdir()
    turns = []
    checkpoints = Checkpoints(tmp_path, keep=9)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "by_first", lambda what, name: turns.append(name) or what())
        checkpoints.forget_after(2)
    checkpoints.close()
    assert turns == ["forget after 2"]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
