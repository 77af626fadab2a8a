"""Guards on numbers worked by hand, and loops that stop, go back and go on."""

import itertools
import json
import math
import stat
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import lenient

from rlhfjax.algorithms import Objective
from rlhfjax.config.upkeep import Guards
from rlhfjax.errors import Diverged
from rlhfjax.training.guards import Guard, Memory, RollBack, good_before, judge, memory_of, remember, with_rollbacks
from rlhfjax.training.ledger import Taken
from rlhfjax.training.loop import Beside
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.offline import train_offline
from rlhfjax.training.update import offline_step
from rlhfjax.types import Skipped, TrainState

FINE = {
    "objective/kl": 9.0,
    "objective/entropy": 30.0,
    "objective/length": 10.0,
    "objective/eos_rate": 0.75,
    "loss/total": 1.0,
    "guard/skipped_in_a_row": 0.0,
}


def kinds(row, memory=Memory(), step=7, **settings):  # noqa: B008  # frozen
    return [found.kind for found in judge(Guards(**settings), memory, step, FINE | row)]


@pytest.mark.parametrize(
    ("kind", "settings", "row", "crossed"),
    [
        ("kl_ceiling", {"kl_ceiling": 9.0}, {}, {"objective/kl": 9.1}),
        ("entropy_floor", {"entropy_floor": 3.0}, {}, {"objective/entropy": 29.0}),  # of a token: 2.9
        ("length_at_cap", {"length_at_cap": 0.25}, {}, {"objective/eos_rate": 0.7}),
        ("non_finite", {"non_finite": 3}, {"guard/skipped_in_a_row": 2.0}, {"guard/skipped_in_a_row": 3.0}),
    ],
)
def test_bounds(kind, settings, row, crossed):
    assert kinds(row, **settings) == []
    assert kinds(row | crossed, **settings) == [kind]
    assert kinds(crossed) == ([kind] if kind == "non_finite" else [])  # not asked for, not watched


def test_what_is_nan_or_missing_is_not_judged():
    settings = Guards(kl_ceiling=1.0, entropy_floor=1.0, length_at_cap=0.1, loss_spike=1.0, spike_window=8)
    memory = Memory(losses=(1.0,) * 8)
    assert judge(settings, memory, 3, {}) == []
    assert judge(settings, memory, 3, dict.fromkeys(FINE, math.nan) | {"guard/skipped_in_a_row": 1.0}) == []


def test_a_spike_is_judged_by_the_full_window_before_it():
    settings = {"loss_spike": 2.0, "spike_window": 8}
    window = (9.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0)  # of the last eight: mean 2, standard deviation 1
    assert kinds({"loss/total": 4.0}, Memory(losses=window), **settings) == []
    assert kinds({"loss/total": 4.01}, Memory(losses=window), **settings) == ["loss_spike"]
    assert kinds({"loss/total": 1e9}, Memory(losses=window[:7]), **settings) == []


def test_the_window_holds_the_last_finite_losses():
    settings, memory = Guards(loss_spike=6.0, spike_window=8), Memory()
    for n in range(20):
        memory = remember(settings, memory, {"loss/total": math.nan if n % 5 == 0 else float(n)})
    assert memory.losses == (9.0, 11.0, 12.0, 13.0, 14.0, 16.0, 17.0, 18.0, 19.0)[1:]
    assert remember(Guards(), Memory(), {"loss/total": 1.0}).losses == ()  # nobody asked for them


def test_memory_survives_a_checkpoint():
    memory = Memory((0.1, 1 / 3, 2e-38), 5, 2, 4, 1, 12)
    assert memory_of(json.loads(json.dumps({"guards": memory.saved()}))) == memory
    assert memory_of({"facts": None}) == Memory()  # from before there were guards


@pytest.mark.parametrize(
    ("steps", "since", "to"),
    [
        ([], 3, None),
        ([2, 4, 6], 7, 4),  # what step 7 measured is the state that 6 holds
        ([2, 4, 6], 8, 6),
        ([2, 4, 6], 6, 4),
        ([6], 7, 6),  # better than to begin again
    ],
)
def test_where_to_go_back_to(steps, since, to):
    assert good_before(steps, since) == to


def test_the_batches_that_rollbacks_pass_over_add_up(tmp_path):
    # At step 6 after the first, batch 6 + 5 was read: step 2 goes on 9 batches ahead. The checkpoint knows of neither.
    guard = Guard(Guards(), tmp_path, "sft")
    for at, left_out in ((7, 5), (6, 9)):
        guard.rolled_back(RollBack(at, at - 1), 2, Memory())
        assert guard.memory.left_out == left_out
    assert guard.memory.rollbacks == 2


class Line(Objective):
    """Half the squared distance to a batch's number."""

    def weight(self, batch):
        return jnp.float32(1.0)

    def loss(self, params, batch, weight, key):
        loss = jnp.square(params - batch.number).sum() / 2
        return loss, {"loss/train": loss}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Number:
    """A batch of one token."""

    number: jax.Array

    def real_tokens(self):
        return jnp.int32(1)


ADAM = lenient(optax.adam(0.1))
STEP = jax.jit(lambda state, batch, key: offline_step(Line(), ADAM, state, batch, key))


class Run:
    """A stage in miniature: a real step on a line of four parameters, checkpoints in memory, and real rows on disk.

    The batch at each place pulls the parameters to its number; those at the places `bad` are NaN.
    """

    def __init__(self, directory, bad=(), settings=None, every=2, steps=8):
        self.directory, self.bad, self.every, self.steps = directory, bad, every, steps
        self.settings = settings or {}
        self.saved, self.read = {}, []

    def fresh(self):
        params = jnp.arange(4, dtype=jnp.float32)
        return TrainState(params, ADAM.init(params), jnp.int32(0))

    def restore(self):
        if not self.saved:
            return self.fresh(), Memory()
        state, meta = self.saved[max(self.saved)]
        memory = memory_of(json.loads(meta))
        return replace(state, skipped=Skipped(jnp.int32(memory.skipped), jnp.int32(memory.in_a_row))), memory

    def batches(self, place):
        for n in itertools.count(place):
            self.read.append(n)
            yield Number(jnp.float32(np.nan if n in self.bad else n))

    def __call__(self, stop_after=None):
        state, memory = self.restore()
        guard = Guard(Guards(**self.settings), self.directory, "sft", memory)
        writer = MetricsWriter(self.directory, int(state.step), tensorboard=False)

        def keep(state, step, measured, stop):
            def save():
                kept = replace(state, skipped=Skipped(jnp.int32(-7), jnp.int32(-7)))  # only the meta has these
                self.saved[step] = kept, json.dumps({"guards": guard.memory.saved()})

            return save if step % self.every == 0 else None

        def train(state):
            return train_offline(
                STEP,
                state,
                self.batches(int(state.step) + guard.memory.left_out),
                steps=stop_after or self.steps,
                key=jax.random.key(0),
                beside=Beside("sft", writer, lambda step: step, guard=guard),
                measure=lambda state, step: {},
                keep=keep,
                taken=lambda step: Taken(10 * step, 2),
            )

        def back(rollback):
            to = good_before(self.saved, rollback.since) or 0
            self.saved = {step: kept for step, kept in self.saved.items() if step <= to}
            state, memory = self.restore()
            guard.rolled_back(rollback, int(state.step), memory)
            writer.back_to(int(state.step))
            return state

        try:
            state = with_rollbacks(train, state, back)
        finally:
            writer.close()
            self.memory = guard.memory
        return state

    def rows(self, name="metrics.jsonl"):
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]


def same_bits(one, other):
    """Parameters and optimizer states are equal to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.optimizer), (other.params, other.optimizer))


def numbers(row):
    """A row without times, and without NaN, which is not equal to itself."""
    return {name: str(value) for name, value in row.items() if not name.startswith(("timing/", "perf/"))}


def test_so_many_in_a_row_stop(tmp_path):
    run = Run(tmp_path, bad={2, 4, 5, 6, 7}, settings={"non_finite": 3})
    with pytest.raises(Diverged, match=r"sft diverged at step 7: 3 steps in a row .*non_finite 3") as stopped:
        run()
    assert stopped.value.exit_code == 4
    assert max(run.saved) == 6  # nothing was saved after what was found
    assert [row["guard/skipped_in_a_row"] for row in run.rows()] == [0, 0, 1, 0, 1, 2, 3]
    assert [row["lr"] for row in run.rows()] == [0, 1, 2, 2, 3, 3, 3]  # the optimizer's own count


def test_what_is_noted_is_numbers_for_the_owner_alone(tmp_path):
    run = Run(tmp_path, bad={2, 3}, settings={"non_finite": 2})
    with pytest.raises(Diverged, match=r"guards.jsonl"):
        run()
    assert run.rows("guards.jsonl") == [
        {"step": 3, "kind": "skipped", "values": dict.fromkeys(NAMES, "nan"), "rows": [30, 31]},
        {"step": 4, "kind": "skipped", "values": dict.fromkeys(NAMES, "nan"), "rows": [40, 41]},
        {"step": 4, "kind": "non_finite", "values": {"value": 2, "bound": 2}, "rows": [40, 41]},
    ]
    assert stat.S_IMODE((tmp_path / "guards.jsonl").stat().st_mode) == 0o600


NAMES = ("loss/train", "loss/total", "grad/norm")


def test_continuing_says_each_kind_once(tmp_path, capfd):
    run = Run(tmp_path, bad={2, 3, 4, 5}, settings={"non_finite": 2, "on_divergence": "continue"})
    state = run()
    assert (int(state.step), int(state.skipped.total)) == (8, 4)
    said = capfd.readouterr().err
    assert (said.count("were not finite"), said.count("steps in a row")) == (1, 1)
    assert [row["guard/divergences"] for row in run.rows()] == [0, 0, 0, 1, 2, 3, 3, 3]


def test_a_rollback_leaves_out_what_lies_between(tmp_path):
    """Batches 4 to 6 are NaN: found at step 7, back to step 2, and batches 2 to 6 are never learned from.

    The outcome is that of a run whose data never had them. Fails when the data do not move on, and when the rows of the
    steps that were left are kept: seen.
    """
    run = Run(tmp_path / "a", bad={4, 5, 6}, settings={"non_finite": 3, "on_divergence": "rollback"}, every=2)
    state = run()
    assert (run.memory.rollbacks, run.memory.left_out) == (1, 5)

    class Without(Run):
        def batches(self, place):
            for n in itertools.count(place):
                yield Number(jnp.float32(n if n < 2 else n + 5))

    straight = Without(tmp_path / "b")
    same_bits(state, straight())
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss/train"] for row in rows] == [row["loss/train"] for row in straight.rows()]
    assert [row["guard/rollbacks"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert run.rows("guards.jsonl")[-1] == {
        "step": 7,
        "kind": "rolled_back",
        "values": {"to": 2, "left_out": 5},
        "rows": [],
    }


def test_a_rollback_before_any_checkpoint_goes_to_the_start(tmp_path):
    run = Run(tmp_path, bad={1}, settings={"non_finite": 1, "on_divergence": "rollback"}, every=5)
    state = run()
    assert (run.memory.rollbacks, run.memory.left_out, int(state.step)) == (1, 2, 8)
    assert [row["step"] for row in run.rows()] == list(range(1, 9))


def test_rollbacks_are_bounded(tmp_path):
    settings = {"non_finite": 2, "on_divergence": "rollback", "rollbacks": 3}
    run = Run(tmp_path, bad=set(range(3, 200)), settings=settings)
    with pytest.raises(Diverged, match="after 3 rollbacks"):
        run()
    assert run.memory.rollbacks == 3
    assert len(run.read) < 40


@pytest.mark.parametrize("killed_after", range(1, 8))
def test_a_resumed_run_guards_as_an_unbroken_one(tmp_path, killed_after):
    """Wherever it is killed. Fails when counts, window, rollbacks or the offset of the data are not restored: seen."""
    settings = {"non_finite": 2, "on_divergence": "rollback", "loss_spike": 3.0, "spike_window": 8}
    bad = {1, 3, 4, 9}
    straight = Run(tmp_path / "a", bad, settings, steps=12)
    wanted = straight()
    run = Run(tmp_path / "b", bad, settings, steps=12)
    run(stop_after=killed_after)
    state = run()
    same_bits(state, wanted)
    assert run.memory == straight.memory
    assert list(map(numbers, run.rows())) == list(map(numbers, straight.rows()))


def test_a_spike_stops_before_it_is_saved(tmp_path):
    run = Run(tmp_path, settings={"loss_spike": 6.0, "spike_window": 8}, steps=14, every=1)
    run.batches = lambda place: (Number(jnp.float32(1e4 if n == 10 else n % 2)) for n in itertools.count(place))
    with pytest.raises(Diverged, match=r"step 11: loss/total is .*loss_spike"):
        run()
    assert max(run.saved) == 10
