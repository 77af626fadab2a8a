"""The loops around the steps: what they call, in which order, with which keys, from which step on."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.training.loop import Beside
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.offline import train_offline
from rlhfjax.training.online import OnlineSteps, train_online
from rlhfjax.types import OnlineState, TrainState


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_at(step: int) -> TrainState:
    return TrainState({}, (), jnp.int32(step))


def key_data(key) -> list[int]:
    return jax.random.key_data(key).tolist()


def run_offline(directory, start, steps):
    """(batches and keys by step, steps that were saved or validated, final state)."""
    calls, looked, saved = [], [], []

    def step_fn(state, batch, key):
        calls.append((batch, key_data(key)))
        return TrainState({}, (), state.step + 1), {"loss/train": jnp.float32(batch), "tokens": jnp.int32(10)}

    def measure(state, step):
        assert int(state.step) == step
        looked.append(step)
        return {"loss/validation": 0.5} if step == 4 else {}

    def keep(state, step, measured, stop):
        assert measured == ({"loss/validation": 0.5} if step == 4 else {})
        # fails when a save comes before its row is written: seen
        return (lambda: saved.append((step, rows(directory / "metrics.jsonl")[-1]["step"]))) if step % 2 == 0 else None

    writer = MetricsWriter(directory, start, tensorboard=False)
    state = train_offline(
        step_fn,
        state_at(start),
        itertools.count(start),
        steps=steps,
        key=jax.random.key(1),
        beside=Beside("sft", writer, lambda step: 0.1 * (step + 1), shown=("loss/train",)),
        measure=measure,
        keep=keep,
    )
    writer.close()
    assert saved == [(step, step) for step in range(start + 1, steps + 1) if step % 2 == 0]
    return calls, looked, state


def test_offline_runs_every_step_once_and_writes_each(tmp_path):
    calls, looked, state = run_offline(tmp_path, 0, 5)
    assert [batch for batch, _ in calls] == [0, 1, 2, 3, 4]
    assert len({tuple(key) for _, key in calls}) == 5
    assert looked == [1, 2, 3, 4, 5]
    assert state.step == 5
    written = rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/train"]) for row in written] == [(n, n - 1) for n in range(1, 6)]
    assert [row["lr"] for row in written] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # of the step that was taken
    assert [row.get("loss/validation") for row in written] == [None, None, None, 0.5, None]
    assert all(row["perf/train_tokens_per_s"] > 0 for row in written)


def test_offline_continues_with_the_keys_of_an_unbroken_run(tmp_path):
    # meant to catch keys that are split along the way instead of made from the step
    straight = run_offline(tmp_path / "a", 0, 5)[0]
    continued = run_offline(tmp_path / "b", 3, 5)
    assert continued[0] == straight[3:]
    assert continued[1] == [4, 5]
    assert run_offline(tmp_path / "c", 5, 5)[0] == []


def run_online(directory, start, iterations):
    """(log of the calls, saved iterations, sample rows' iterations, final state)."""
    log, saved = [], []

    def rollout(params, prompts, key):
        log.append(("rollout", prompts, key_data(key)))
        return prompts

    def score(params, frozen, rollout):
        log.append(("score", frozen, rollout))
        return rollout

    def estimate(rollout, kl_coef):
        log.append(("estimate", rollout, float(kl_coef)))
        return rollout, {"objective/kl": jnp.float32(rollout), "tokens": jnp.int32(7)}

    def update(state, experience, pretraining, measured, key):
        log.append(("update", experience, pretraining, float(measured["objective/kl"]), key_data(key)))
        state = OnlineState(state.train, state.kl_coef + 1, state.iteration + 1)
        updates = {"policy/epochs_run": jnp.float32(2), "updates": 4 * (state.iteration - 1)}
        return state, updates | {"loss/ptx": jnp.float32(0)}

    def keep(state, iteration, stop):
        return (lambda: saved.append((iteration, int(state.iteration)))) if iteration % 2 == 0 else None

    writer = MetricsWriter(directory, start, tensorboard=False)
    state = train_online(
        OnlineSteps(rollout, score, estimate, update, episodes=8),
        OnlineState(state_at(start), jnp.float32(start), jnp.int32(start)),
        "frozen",
        itertools.count(start),
        itertools.count(100 + start),
        iterations=iterations,
        key=jax.random.key(1),
        beside=Beside("ppo", writer, lambda step: step / 10),
        sampled=lambda iteration, rollout: writer.write_samples(iteration, [{"prompt": rollout}]),
        keep=keep,
    )
    writer.close()
    return log, saved, state


def test_online_calls_the_four_steps_in_order(tmp_path):
    log, saved, state = run_online(tmp_path, 0, 4)
    assert [call[0] for call in log] == ["rollout", "score", "estimate", "update"] * 4
    assert [call[1] for call in log if call[0] == "rollout"] == [0, 1, 2, 3]
    assert [call[1:] for call in log if call[0] == "score"] == [("frozen", n) for n in range(4)]
    assert [call[2] for call in log if call[0] == "estimate"] == [0, 1, 2, 3]  # the coefficient before the update
    assert [call[1:4] for call in log if call[0] == "update"] == [(n, 100 + n, n) for n in range(4)]
    keys = [tuple(call[-1]) for call in log if call[0] in ("rollout", "update")]
    assert len(set(keys)) == 8
    assert saved == [(2, 2)]  # the last one is saved by the stage, with what it made of it
    assert int(state.iteration) == 4
    written = rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["objective/kl"]) for row in written] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert [row["episode"] for row in written] == [8, 16, 24, 32]
    assert [row["lr"] for row in written] == pytest.approx([0, 0.4, 0.8, 1.2])  # of the iteration's first step
    for name in ("rollout", "score", "estimate", "update"):
        assert all(row[f"timing/{name}_s"] >= 0 for row in written)
    assert "tokens" not in written[0]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2, 3, 4]


def test_online_continues_as_an_unbroken_run(tmp_path):
    # meant to catch keys that are split along the way instead of made from the iteration
    straight = run_online(tmp_path / "a", 0, 4)[0]
    assert run_online(tmp_path / "b", 2, 4)[0] == straight[8:]
    assert run_online(tmp_path / "c", 4, 4)[0] == []
