"""The split of an iteration, and traces that hold the steps they were asked for."""

import gzip
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.config.upkeep import Profile
from rlhfjax.training import profiling
from rlhfjax.training.loop import Beside
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.metrics_catalogue import metric_of
from rlhfjax.training.offline import train_offline
from rlhfjax.training.profiling import Clock, Trace
from rlhfjax.types import TrainState


def test_what_no_part_took_is_the_hosts(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(profiling.time, "monotonic", lambda: next(times))
    clock = Clock()
    with clock("rollout"):
        pass
    with clock("update"):
        pass
    got = clock.metrics()
    assert got == {
        "timing/rollout_s": 3.0, "timing/update_s": 1.0, "timing/host_s": 6.0, "timing/step_s": 10.0,
        "timing/rollout_share": 0.3, "timing/update_share": 0.1, "timing/host_share": 0.6,
    }  # fmt: skip
    assert all(metric_of(name) for name in got)


def test_only_the_steps_asked_for_are_traced(tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path, **_: log.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: log.append("stop"))
    trace = Trace(tmp_path, Profile(start=2, steps=3), "sft")
    for step in range(11, 17):  # a run that continues after step 10
        with trace.step(step):
            log.append(step)
    trace.close()
    assert log == [11, "start", 12, 13, 14, "stop", 15, 16]
    short = Trace(tmp_path, Profile(start=1, steps=9), "sft")
    with pytest.raises(KeyError), short.step(1):
        raise KeyError
    assert log[-2:] == ["start", "stop"]


def test_a_trace_of_an_offline_stage_names_its_steps(tmp_path):
    @jax.jit
    def step_fn(state, batch, key):
        with jax.named_scope("inside"):
            loss = jnp.sin(batch * jnp.ones((64, 64))).sum()
        return TrainState({}, (), state.step + 1), {"loss/train": loss, "tokens": jnp.int32(1)}

    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    train_offline(
        step_fn,
        TrainState({}, (), jnp.int32(0)),
        itertools.count(1.0),
        steps=5,
        key=jax.random.key(0),
        beside=Beside("sft", writer, lambda step: 0.1, trace=Trace(tmp_path, Profile(start=2, steps=2), "sft")),
        measure=lambda state, step: {},
        keep=lambda state, step, measured, stop: None,
    )
    writer.close()
    assert steps_traced(tmp_path / "profile", "sft") == ["2", "3"]


def steps_traced(directory, name):
    """The numbers of the steps of that name in a trace; there is a file for XProf, too."""
    [_] = directory.glob("plugins/profile/*/*.xplane.pb")
    [path] = directory.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(event["args"]["step_num"] for event in events if event.get("name") == name and "args" in event)
