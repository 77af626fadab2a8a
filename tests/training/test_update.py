"""One optimizer step, and epochs of minibatches, on models small enough to follow by hand."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import VOCAB, cross_entropy_from, experience, lenient, log_probs_from, ppo_config, token_batch

from rlhfjax.algorithms import Mix, Objective, OnlineAlgorithm
from rlhfjax.algorithms.language_modelling import LanguageModelling
from rlhfjax.algorithms.ppo import Ppo
from rlhfjax.stages.online_programs import optimizer_of
from rlhfjax.training.averaging import Average
from rlhfjax.training.update import Passes, all_finite, apply_gradients, offline_step, online_update
from rlhfjax.types import Skipped, TrainState

ROWS, COEF = 8, 3.0


def by_last_token(params, rollout):
    """Logits (or values) of a response token from the token before it."""
    before = jnp.concatenate([rollout.prompt[:, -1:], rollout.response[:, :-1]], axis=1)
    return params[before]


PPO = Ppo(
    log_probs_from(lambda params, rollout: by_last_token(params["policy"]["embedding"], rollout)),
    lambda params, made: by_last_token(params["value"]["bias"], made),
    value_coef=0.3,
    entropy_coef=0.02,
)
LANGUAGE = LanguageModelling(cross_entropy_from(lambda params, batch: params["policy"]["embedding"][batch.tokens]))
MADE, TEXT = experience(ROWS, 3, 5), token_batch(ROWS, 6)
OPTIMIZER = {"lr": 0.05, "schedule": "constant", "clip_norm": 0.1, "eps": 1e-3, "weight_decay": 0.1}


def start(average: bool = False) -> TrainState:
    rng = np.random.default_rng(1)
    params = {
        "policy": {"embedding": jnp.asarray(rng.normal(0, 0.5, (VOCAB, VOCAB)), jnp.float32)},
        "value": {"bias": jnp.asarray(rng.normal(0, 0.5, VOCAB), jnp.float32)},
    }
    optimizer = optimizer_of(ppo_config(optimizer=OPTIMIZER))
    return TrainState(params, optimizer.init(params), jnp.int32(0), params["policy"] if average else None)


def updater(algorithm, *, optimizer=None, **settings):
    """`online_update`, compiled; one epoch and one minibatch if not said otherwise."""
    optimizer = optimizer or lenient(optimizer_of(ppo_config(optimizer=OPTIMIZER)))
    average = Average(settings.pop("ema_decay"), lambda params: params["policy"]) if "ema_decay" in settings else None
    passes = Passes(**{"epochs": 1, "minibatches": 1} | settings)
    run = jax.jit(lambda s, e, x, k: online_update(algorithm, optimizer, s, e, x, k, passes, kept=average))

    def update(state, made=MADE, text=None, seed=0):
        return run(state, made, text, jax.random.key(seed))

    return update


@pytest.mark.parametrize("parts", [1, 4])
def test_ppo_ptx_is_one_adam_step_on_the_sum_of_both_gradients(parts):
    """Adam on clip(g_ppo + γ g_ptx), by hand: one clipping of the sum, one step.

    Meant to catch two steps, each gradient clipped by itself, and γ left out or applied twice.
    """
    state = start()
    ppo = jax.grad(lambda p: PPO.loss(p, MADE, PPO.weight(MADE))[0])(state.params)
    language = jax.grad(lambda p: LANGUAGE.loss(p, TEXT, LANGUAGE.weight(TEXT))[0])(state.params)["policy"]
    got, metrics = updater(Mix(PPO, COEF, LANGUAGE, lambda params: params["policy"]), parts=parts)(state, text=TEXT)
    both = {
        "policy": np.asarray(ppo["policy"]["embedding"]) + COEF * np.asarray(language["embedding"]),
        "value": np.asarray(ppo["value"]["bias"]),
    }
    for name, leaf, decay in (("policy", "embedding", 0.1), ("value", "bias", 0.0)):
        norm = np.sqrt(np.square(both[name]).sum())
        assert norm > 0.1 or name == "value"
        gradient = both[name] * min(1.0, 0.1 / norm)
        before = np.asarray(state.params[name][leaf])
        # the first step of Adam: both moments, corrected, are the gradient and its square
        wanted = before - 0.05 * (gradient / (np.abs(gradient) + 1e-3) + decay * before)
        np.testing.assert_allclose(got.params[name][leaf], wanted, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics[f"grad/{name}_norm"], norm, rtol=1e-5)
    assert got.step == 1
    wanted = -np.mean(text_log_probs(state.params["policy"]["embedding"]))
    np.testing.assert_allclose(metrics["loss/ptx"], wanted, rtol=1e-5)
    norms = [np.linalg.norm(tree["embedding"]) for tree in (language, ppo["policy"])]
    np.testing.assert_allclose(metrics["grad/ptx_to_ppo_norm_ratio"], COEF * norms[0] / norms[1], rtol=1e-5)


def text_log_probs(table, rows=range(ROWS)):
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1))
    segments, tokens = np.asarray(TEXT.segments), np.asarray(TEXT.tokens)
    return [
        log_p[tokens[row, t - 1], tokens[row, t]]
        for row in rows
        for t in range(1, tokens.shape[1])
        if TEXT.loss_mask[row, t] and segments[row, t] == segments[row, t - 1]
    ]


def test_each_step_has_its_own_share_of_the_pretraining_text():
    """Four steps, two rows each: every row is used once.

    With targets in one row alone and all other rows empty, the mean over steps is a quarter of that row's loss.
    """
    still, state = optax.set_to_zero(), start()
    update = updater(Mix(PPO, 1.0, LANGUAGE), optimizer=still, epochs=2, minibatches=2)
    frozen = TrainState(state.params, still.init(state.params), state.step)
    for row in range(ROWS):
        alone = replace(TEXT, loss_mask=TEXT.loss_mask & (jnp.arange(ROWS) == row)[:, None])
        wanted = -np.mean(text_log_probs(state.params["policy"]["embedding"], rows=[row])) / 4
        assert update(frozen, text=alone)[1]["loss/ptx"] == pytest.approx(wanted, rel=1e-4)


@dataclass(frozen=True)
class Visits(OnlineAlgorithm):
    """A loss whose gradient writes down which rows a step saw, and when: `clock` counts the steps."""

    def weight(self, rows):
        return jnp.float32(1.0)

    def loss(self, params, rows, weight, key):
        book = params["policy"]
        now = jax.lax.stop_gradient(book["clock"])
        seen = jnp.zeros_like(book["count"]).at[rows].add(1.0)
        at_first = seen * (now == 0).astype(jnp.float32)
        entries = seen * book["count"] + now * seen * book["time"] + at_first * book["first"]
        return -entries.sum() - book["clock"], {"val/ratio_err": now, "policy/approxkl_avg": now}


def visits(seed=0, **settings):
    """(book, metrics, steps) of an update over 12 rows."""
    rows, sgd = 12, optax.sgd(1.0)
    params = {"policy": {name: jnp.zeros(rows) for name in ("count", "time", "first")} | {"clock": jnp.zeros(())}}
    state = TrainState(params, sgd.init(params), jnp.int32(0))
    update = updater(Visits(), optimizer=sgd, **settings)
    state, metrics = update(state, jnp.arange(rows, dtype=jnp.int32), seed=seed)
    return jax.device_get(state.params["policy"]), metrics, int(state.step)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 4), (2, 12)])
def test_each_row_is_visited_once_an_epoch(epochs, minibatches):
    # meant to catch rows drawn with replacement, and minibatches that overlap
    book, metrics, steps = visits(epochs=epochs, minibatches=minibatches)
    assert book["count"].tolist() == [epochs] * 12
    assert steps == epochs * minibatches
    assert book["first"].sum() == 12 // minibatches
    assert metrics["policy/epochs_run"] == epochs
    assert metrics["policy/first_minibatch_ratio_err"] == 0
    assert metrics["val/ratio_err"] == pytest.approx((steps - 1) / 2)  # the mean over all steps


def test_epochs_are_shuffled_apart_and_by_the_key():
    # with 12 steps an epoch, time = position in epoch 1 + position in epoch 2 + 12; equal orders give even numbers
    first, again, other = (visits(seed, epochs=2, minibatches=12)[0]["time"] - 12 for seed in (0, 0, 1))
    assert sorted(visits(epochs=1, minibatches=12)[0]["time"].tolist()) == list(range(12))
    assert (first % 2 == 1).any()
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(("stop", "taken"), [(0.0, 2), (3.0, 5), (100.0, 8)])
def test_kl_stop_ends_the_update_after_the_step_that_exceeds_it(stop, taken):
    # the "approximate KL" of step n is n; meant to catch steps that are left but count in the metrics
    book, metrics, steps = visits(epochs=2, minibatches=4, kl_stop=stop)
    assert (steps, book["clock"]) == (taken, taken)
    assert book["count"].sum() == 3 * taken
    assert metrics["policy/approxkl_avg"] == pytest.approx((taken - 1) / 2)
    assert metrics["policy/epochs_run"] == pytest.approx(taken / 4)
    assert metrics["guard/skipped_updates"] == 0  # a step that was not taken was not skipped either


def test_kl_stop_leaves_the_state_bit_for_bit_where_it_was():
    # fails when moments or the average still move after the stop. One row, so that no shuffle changes a sum's order.
    one = jax.tree.map(lambda x: x[:1], MADE)
    one = replace(one, rollout=replace(one.rollout, log_probs=one.rollout.log_probs - 0.1))
    stopped, metrics = updater(PPO, epochs=5, kl_stop=1e-9, ema_decay=0.9)(start(average=True), one)
    short, _ = updater(PPO, epochs=1, kl_stop=1e9, ema_decay=0.9)(start(average=True), one)
    assert (float(metrics["policy/epochs_run"]), int(stopped.step)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, stopped, short)


def test_the_average_follows_the_policy_alone():
    # average_3 = (d² p_1 + d p_2 + p_3) / (d² + d + 1). Meant to catch d and 1 - d exchanged, and a share of p_0
    state, passed, update = start(average=True), [], updater(PPO, ema_decay=0.9)
    for step in range(3):
        state, _ = update(state, seed=step)
        passed.append(np.asarray(state.params["policy"]["embedding"], np.float64))
    expected = (0.81 * passed[0] + 0.9 * passed[1] + passed[2]) / 2.71
    assert set(state.average) == {"embedding"}
    np.testing.assert_allclose(state.average["embedding"], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - np.asarray(state.params["policy"]["embedding"])).max() > 0.01


def test_the_average_of_an_offline_model_is_of_all_of_it():
    params = {"embedding": jnp.ones((VOCAB, VOCAB)), "other": jnp.ones(3)}
    sgd = optax.sgd(1.0)
    state = TrainState(params, sgd.init(params), jnp.int32(4), params)
    gradient = jax.tree.map(jnp.ones_like, params)
    # Step 5, two of the four before having been skipped, is the third update: it weighs 1 / (1 + 3/4 + 9/16) = 16/37.
    moved = apply_gradients(sgd, replace(state, skipped=Skipped(jnp.int32(2), jnp.int32(0))), gradient, Average(0.75))
    assert moved.step == 5
    for name in params:
        np.testing.assert_allclose(moved.params[name], 0.0)
        np.testing.assert_allclose(moved.average[name], 21 / 37, rtol=1e-6)
    assert apply_gradients(sgd, replace(state, average=None), gradient).average is None


def test_offline_step_reports_its_gradient_and_its_tokens():
    language = LanguageModelling(cross_entropy_from(lambda params, batch: params["embedding"][batch.tokens]))
    params, sgd = {"embedding": start().params["policy"]["embedding"]}, optax.sgd(0.5)
    state = TrainState(params, sgd.init(params), jnp.int32(0))
    after, metrics = jax.jit(lambda s, b, k: offline_step(language, sgd, s, b, k, parts=2))(
        state, TEXT, jax.random.key(0)
    )
    gradient = jax.grad(lambda p: language.loss(p, TEXT, language.weight(TEXT))[0])(params)["embedding"]
    np.testing.assert_allclose(after.params["embedding"], params["embedding"] - 0.5 * gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["grad/norm"], np.sqrt(np.square(gradient).sum()), rtol=1e-5)
    assert int(metrics["tokens"]) == int((np.asarray(TEXT.segments) > 0).sum())
    np.testing.assert_allclose(metrics["loss/train"], -np.mean(text_log_probs(params["embedding"])), rtol=1e-5)


@dataclass(frozen=True)
class Offset(Objective):
    """A loss that is beyond all numbers where the batch says so, and whose gradient is an ordinary one all the same."""

    def weight(self, batch):
        return jnp.float32(1.0)

    def loss(self, params, batch, weight, key):
        loss = jnp.square(params["kernel"] - batch.pull).sum() + jax.lax.stop_gradient(batch.offset)
        return loss, {"loss/train": loss}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pull:
    pull: jax.Array
    offset: jax.Array

    def real_tokens(self):
        return jnp.int32(1)


@pytest.fixture(scope="module")
def pulled():
    """State and metrics after some batches: where they pull to, offset of the loss, factor of the gradient."""
    rising = optax.scale_by_schedule(lambda count: -0.01 * (count + 1).astype(jnp.float32))
    optimizer = lenient(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), rising))
    step = jax.jit(lambda s, b, p: offline_step(Offset(), optimizer, s, b, jax.random.key(0), 1, Average(0.9), p))

    def run(*batches):
        params = {"kernel": jnp.asarray([0.3, -0.7, 1.1], jnp.float32)}
        state, told = TrainState(params, optimizer.init(params), jnp.int32(0), params), []
        for pull, offset, poison in batches:
            batch = Pull(jnp.arange(3, dtype=jnp.float32) + pull, jnp.float32(offset))
            state, metrics = step(state, batch, jnp.float32(poison))
            told.append({name: float(value) for name, value in metrics.items()})
        return state, told

    return run


@pytest.mark.parametrize(
    ("offset", "poison"), [(np.nan, 1), (np.inf, 1), (-np.inf, 1), (0, np.nan), (0, np.inf), (0, -np.inf)]
)
def test_an_update_that_is_not_finite_never_was(offset, poison, pulled):
    """The loss, or the gradient, of the second of three batches: the state is that of a run of the other two."""
    state, told = pulled((0.0, 0, 1), (7.0, offset, poison), (2.0, 0, 1))
    without, rows = pulled((0.0, 0, 1), (2.0, 0, 1))
    assert (int(state.step), int(state.skipped.total), int(state.skipped.in_a_row)) == (3, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, replace(state, step=without.step, skipped=without.skipped), without)
    assert [row["guard/skipped_updates"] for row in told] == [0, 1, 0]
    assert [row["guard/skipped_in_a_row"] for row in told] == [0, 1, 0]
    assert [row["updates"] for row in told] == [0, 1, 1]
    assert [row["grad/norm"] for row in told[::2]] == [row["grad/norm"] for row in rows]


def test_a_skipped_update_leaves_every_bit(pulled):
    state, _ = pulled((0.0, 0, 1))
    after, _ = pulled((0.0, 0, 1), (1.0, np.nan, 1), (2.0, 0, np.nan))
    assert (int(after.step), int(after.skipped.total), int(after.skipped.in_a_row)) == (3, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, replace(after, step=state.step, skipped=state.skipped), state)


def test_what_is_finite():
    numbers = {"a": jnp.ones(3), "b": jnp.arange(3, dtype=jnp.int32), "c": jnp.ones((2, 2), jnp.bfloat16)}
    assert all_finite(numbers)
    assert all_finite({"b": numbers["b"]})
    for name, bad in (("a", jnp.nan), ("a", -jnp.inf), ("c", jnp.inf)):
        assert not all_finite(numbers | {name: numbers[name].at[-1].set(bad)})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Marked:
    """Rows with a number each, which only what is measured reads."""

    row: jax.Array
    number: jax.Array


@dataclass(frozen=True)
class MarkedVisits(Visits):
    def loss(self, params, rows, weight, key):
        loss, metrics = super().loss(params, rows.row, weight, key)
        return loss, {name: value + 0 * rows.number.sum() for name, value in metrics.items()}


def marked_visits(bad, **settings):
    """As `visits`, with numbers that are not finite in the rows `bad`."""
    number = np.zeros(12, np.float32)
    number[bad] = np.nan, *([np.inf] * (len(bad) - 1))
    params = {"policy": {name: jnp.zeros(12) for name in ("count", "time", "first")} | {"clock": jnp.zeros(())}}
    sgd = optax.sgd(1.0)
    state = TrainState(params, sgd.init(params), jnp.int32(0))
    made = Marked(jnp.arange(12, dtype=jnp.int32), jnp.asarray(number))
    state, metrics = updater(MarkedVisits(), optimizer=sgd, **settings)(state, made)
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("stop", [None, 100.0])
def test_only_the_minibatches_with_the_bad_row_are_skipped(stop):
    # fails when a NaN ends the epochs as an exceeded kl.stop does, and when the means hold skipped minibatches: seen
    state, metrics = marked_visits([5], epochs=2, minibatches=2, kl_stop=stop)
    book = state.params["policy"]
    assert (book["clock"], book["count"].sum(), book["count"][5]) == (2, 12, 0)
    assert set(book["count"].tolist()) <= {0, 1, 2}
    assert (state.step, state.skipped.total, state.skipped.in_a_row) == (4, 2, 0)
    assert (metrics["guard/skipped_updates"], metrics["guard/skipped_in_a_row"]) == (2, 0)
    assert (metrics["policy/epochs_run"], metrics["val/ratio_err"]) == (2, 0.5)  # the clock of the two that ran


def test_an_iteration_without_a_finite_update_counts_once():
    state, metrics = marked_visits([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], epochs=2, minibatches=2)
    assert {name: leaf.sum() for name, leaf in state.params["policy"].items()} == dict.fromkeys(
        ("count", "time", "first", "clock"), 0
    )
    assert (state.step, state.skipped.total, state.skipped.in_a_row) == (4, 4, 1)
    assert (metrics["guard/skipped_updates"], metrics["guard/skipped_in_a_row"]) == (4, 1)
    assert np.isnan(metrics["val/ratio_err"])


@pytest.mark.parametrize("field", ["scores", "log_probs", "ref_log_probs", "values", "advantages", "returns"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_ppo_skips_numbers_of_a_rollout_that_are_not_finite(field, bad, poisoned_update):
    inside = field in ("advantages", "returns")
    value = getattr(MADE if inside else MADE.rollout, field).at[0].set(bad)
    made = replace(MADE, **{field: value}) if inside else replace(MADE, rollout=replace(MADE.rollout, **{field: value}))
    before = start(average=True)
    after, metrics = poisoned_update(before, made)
    assert (int(after.step), int(after.skipped.total)) == (1, 1)
    assert metrics["guard/skipped_updates"] == 1
    jax.tree.map(np.testing.assert_array_equal, replace(after, step=before.step, skipped=before.skipped), before)


@pytest.fixture(scope="module")
def poisoned_update():
    return updater(PPO, ema_decay=0.9)
