"""Gradients over micro batches, one optimizer step, and PPO's epochs x minibatches as one scan.

An update in which a number is not finite is skipped: parameters, moments, schedule and average keep their bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from rlhfjax.algorithms import Objective
from rlhfjax.algorithms.objective import Gradients, Mix, MixedBatch, online_part
from rlhfjax.host_memory import back, on_device
from rlhfjax.layout import as_parameters
from rlhfjax.training.averaging import Average, moved_average
from rlhfjax.types import Params, Skipped, TrainState

Pack = Callable[[Any], tuple[Any, Array]]


@jax.named_scope("gradients")  # as a trace shows it
def gradients(
    objective: Objective | Mix, params: Params, batch: Any, key: jax.Array, parts: int = 1, pack: Pack | None = None
) -> Gradients:
    """Gradient of the loss over `batch`, taken in `parts` equal parts one after the other.

    `pack(batch)` gives the parts of packed rows instead, stacked, and how many of them hold anything. The loss is
    normalised by the count of the whole batch, so the result does not depend on either. `loss/total` is that loss.
    """
    if isinstance(objective, Mix):
        first, second = jax.random.split(key)
        return objective.mixed(
            gradients(objective.first, params, batch.first, first, parts, pack),
            gradients(objective.second, params, batch.second, second, parts),
        )
    inputs, used = pack(batch) if pack else (batch, parts)
    weight = objective.weight(inputs)

    def part_gradients(part, key):
        (loss, metrics), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, part, weight, key)
        # Moments lie apart over `data`; no product of the backward pass is to follow them there.
        return as_parameters(grads), metrics | {"loss/total": loss}

    if pack is None and parts == 1:
        return part_gradients(batch, key)
    if pack is None:
        inputs = jax.tree.map(lambda x: _split(x, parts), batch)
    inputs = inputs, jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
    if len(inputs[1]) == 1:
        return part_gradients(*jax.tree.map(lambda x: x[0], inputs))
    if survey := objective.survey:  # with the same keys, it sees what the losses will see
        weight |= summed(partial(survey, params), (inputs[0], jax.random.clone(inputs[1])), used)
    return summed(part_gradients, inputs, used)


def summed(function: Callable[..., Any], inputs: Any, count: int | Array) -> Any:
    """Σ function(*inputs[i]) over the first `count`, one after the other."""
    function = jax.jit(function, inline=True)  # traced once, not for its shapes and again for the loop
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], inputs))

    def add(i, total):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), inputs)
        return jax.tree.map(jnp.add, total, function(*part))

    return jax.lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, shapes))


def _split(x: Array, parts: int) -> Array:
    # Row i goes to part i % parts: every part holds rows of every device, and none has to move.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


@jax.named_scope("optimizer")
def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params, kept: Average | None = None
) -> TrainState:
    """One optimizer step, after which the average moves; skipped updates do not count for it."""
    updates, moments = optimizer.update(grads, on_device(state.optimizer), state.params)
    params: Any = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None and kept is not None:
        taken = state.step - state.skipped.total + 1
        average = back(moved_average(on_device(average), kept.of(params), kept.decay, taken), average)
    moments = back(moments, state.optimizer)
    return replace(state, params=params, optimizer=moments, step=state.step + 1, average=average)


def apply_if_finite(
    finite: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    kept: Average | None = None,
) -> TrainState:
    """`apply_gradients`, or the state with one more `step` and `skipped.total` and every other bit as it was.

    The branch is taken on the device. A select over the tree took AdamW on a CPU twice the time: the moments were
    computed in two loops.
    """

    def skip() -> TrainState:
        return replace(state, step=state.step + 1, skipped=replace(state.skipped, total=state.skipped.total + 1))

    return jax.lax.cond(finite, lambda: apply_gradients(optimizer, state, grads, kept), skip)


def all_finite(*trees: Any) -> Bool[Array, ""]:
    """Whether no number of any tree is NaN or infinite; integers always are finite."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all() if leaves else jnp.bool_(True)


def _counted(state: TrainState, skips: Array, steps: int | Array) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step or an iteration that skipped so many of its updates, and the guards' metrics of it."""
    in_a_row = jnp.where(skips == steps, state.skipped.in_a_row + 1, 0)
    counts = {"guard/skipped_updates": skips, "guard/skipped_in_a_row": in_a_row}
    return replace(state, skipped=Skipped(state.skipped.total, in_a_row)), counts


def offline_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: jax.Array,
    parts: int = 1,
    kept: Average | None = None,
    poison: Array | None = None,
    pack: Pack | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step over a batch of data; `parts` and `pack` as in `gradients`.

    Skipped where its loss or the norm of its gradient is not finite. `poison`, in tests of that, multiplies the
    gradient. `updates` among the metrics is how many updates the optimizer had taken before.
    """
    grads, metrics = gradients(objective, state.params, batch, key, parts, pack)
    if poison is not None:
        grads = jax.tree.map(lambda g: poison.astype(g.dtype) * g, grads)
    norm, updates = optax.tree.norm(grads), state.step - state.skipped.total
    finite = all_finite(metrics["loss/total"], norm)
    state = apply_if_finite(finite, optimizer, state, grads, kept)
    state, counts = _counted(state, (~finite).astype(jnp.int32), 1)
    return state, metrics | counts | {"grad/norm": norm, "tokens": batch.real_tokens(), "updates": updates}


@dataclass(frozen=True)
class Passes:
    """How an iteration learns: `epochs` passes over its experience, reshuffled each time, `minibatches` steps per pass.

    A minibatch is taken in `parts` equal parts, or as `pack` lays it out. Once the approximate KL of a step exceeds
    `kl_stop`, the steps that are left do nothing.
    """

    epochs: int
    minibatches: int
    parts: int = 1
    pack: Pack | None = None
    kl_stop: float | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.epochs * self.minibatches

    def order(self, key: jax.Array, size: int, group: int) -> Int[Array, "steps rows"]:
        """The rows of each step; each `group` rows next to each other stay together."""
        keys = jax.random.split(key, self.epochs)
        order = jax.vmap(lambda k: jax.random.permutation(k, size // group))(keys)
        order = order[:, :, None] * group + jnp.arange(group, dtype=jnp.int32)[None, None, :]
        return order.reshape(self.steps, size // self.minibatches)


def online_update(
    objective: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    experience: Any,
    pretraining: Any,
    key: jax.Array,
    passes: Passes,
    group: int = 1,
    kept: Average | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The updates of an iteration as one scan; `objective` is an `OnlineAlgorithm`, perhaps with a loss mixed in.

    `pretraining` (None where nothing is mixed in) holds the sequences of all the steps.

    A step is skipped where a number of its minibatch (scores, log-probabilities, advantages, returns), its loss or the
    norm of a gradient is not finite. Metrics are means over the steps that were taken: NaN when there was none.
    """
    online, steps = online_part(objective), passes.steps
    shuffle_key, step_key = jax.random.split(key)
    order = passes.order(shuffle_key, jax.tree.leaves(experience)[0].shape[0], group)
    extra = jax.tree.map(lambda x: _split(x, steps), pretraining)
    updates = state.step - state.skipped.total

    def take_step(state, rows, extra, key):
        minibatch = jax.tree.map(lambda x: x[rows], experience)
        batch = MixedBatch(minibatch, extra) if isinstance(objective, Mix) else minibatch
        grads, metrics = gradients(objective, state.params, batch, key, passes.parts, passes.pack)
        norms = {f"grad/{name}_norm": optax.tree.norm(tree) for name, tree in grads.items()}
        finite = all_finite(minibatch, metrics["loss/total"], online.divergence(metrics), norms)
        state = apply_if_finite(finite, optimizer, state, grads, kept)
        # What the loop carries to its next step would lie as moments do, apart over `data`.
        return replace(state, params=as_parameters(state.params)), (metrics | norms, finite)

    take_step = jax.jit(take_step, inline=True)  # traced once, however often it is asked for

    def body(carry, inputs):
        state, running = carry
        rows, extra, key = inputs
        if passes.kl_stop is None:
            state, (metrics, finite) = take_step(state, rows, extra, key)
            return (state, running), (metrics, finite, running)
        shapes = jax.eval_shape(take_step, state, rows, extra, key)[1]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, (metrics, finite) = jax.lax.cond(
            running, lambda: take_step(state, rows, extra, key), lambda: (state, nothing)
        )
        within = ~finite | (online.divergence(metrics) <= passes.kl_stop)  # a step that was skipped moved nothing
        return (state, running & within), (metrics, finite, running)

    inputs = (order, extra, jax.random.split(step_key, steps))
    (state, _), (metrics, finite, ran) = jax.lax.scan(body, (state, jnp.bool_(True)), inputs)
    means = _means(metrics, finite, ran) | online.at_first({name: values[0] for name, values in metrics.items()})
    means["policy/epochs_run"] = ran.sum().astype(jnp.float32) / passes.minibatches
    state, counts = _counted(state, (ran & ~finite).sum(), ran.sum())
    return state, means | counts | {"updates": updates}


def _means(metrics: dict[str, Array], finite: Bool[Array, "S"], ran: Bool[Array, "S"]) -> dict[str, Array]:
    """Over the steps that were taken."""
    learned = (finite & ran).sum().astype(jnp.float32)
    return {name: jnp.where(finite, values, 0.0).sum() / learned for name, values in metrics.items()}
