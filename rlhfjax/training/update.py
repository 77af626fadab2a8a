"""Gradients over micro batches, one optimizer step, and PPO's epochs x minibatches as one scan.

An update in which a number is not finite is skipped: parameters, moments, schedule and average keep their bits.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from rlhfjax.algorithms.mix import Mix, MixedBatch
from rlhfjax.training.averaging import moved_average
from rlhfjax.types import Params, Skipped, TrainState

Pack = Callable[[Any], tuple[Any, Array]]


@jax.named_scope("gradients")  # as a trace shows it
def gradients(
    algorithm: Any, params: Params, batch: Any, key: jax.Array, parts: int = 1, pack: Pack | None = None
) -> tuple[Params, dict[str, Array]]:
    """Gradient of the loss over `batch`, taken in `parts` equal parts one after the other.

    `pack(batch)` gives the parts of packed rows instead, stacked, and how many of them hold anything. The loss is
    normalised by the count of the whole batch, so the result does not depend on either. `loss/total` is that loss.
    """
    if isinstance(algorithm, Mix):
        return _mixed_gradients(algorithm, params, batch, key, parts, pack)
    inputs, used = pack(batch) if pack else (batch, parts)
    weight = algorithm.weight(inputs)

    def part_gradients(part, key):
        (loss, metrics), grads = jax.value_and_grad(algorithm.loss, has_aux=True)(params, part, weight, key)
        return grads, metrics | {"loss/total": loss}

    if pack is None and parts == 1:
        return part_gradients(batch, key)
    if pack is None:
        inputs = jax.tree.map(lambda x: _split(x, parts), batch)
    inputs = inputs, jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
    if len(inputs[1]) == 1:
        return part_gradients(*jax.tree.map(lambda x: x[0], inputs))
    if survey := getattr(algorithm, "survey", None):  # with the same keys, it sees what the losses will see
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


def _mixed_gradients(
    algorithm: Mix, params: Params, batch: MixedBatch, key: jax.Array, parts: int, pack: Pack | None
) -> tuple[Params, dict[str, Array]]:
    first_key, second_key = jax.random.split(key)
    first, metrics = gradients(algorithm.first, params, batch.first, first_key, parts, pack)
    second, second_metrics = gradients(algorithm.second, params, batch.second, second_key, parts)
    second = jax.tree.map(lambda g: algorithm.coef * g, second)
    ratio = optax.tree.norm(second) / jnp.maximum(optax.tree.norm(first.get("policy", first)), 1e-12)
    total = metrics["loss/total"] + algorithm.coef * second_metrics["loss/total"]
    mixed = {"loss/ptx": second_metrics["loss/train"], "grad/ptx_to_ppo_norm_ratio": ratio, "loss/total": total}
    metrics = metrics | mixed
    return jax.tree.map(jnp.add, first, second), metrics


@jax.named_scope("optimizer")
def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params, ema_decay: float | None = None
) -> TrainState:
    """One optimizer step, after which the average moves (`moved_average`); skipped updates do not count for it."""
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None and ema_decay is not None:
        taken = state.step - state.skipped.total + 1
        average = moved_average(average, params.get("policy", params), ema_decay, taken)
    return replace(state, params=params, optimizer=opt_state, step=state.step + 1, average=average)


def apply_if_finite(
    finite: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    ema_decay: float | None = None,
) -> TrainState:
    """`apply_gradients`, or the state with one more `step` and `skipped.total` and every other bit as it was.

    The branch is taken on the device. A select over the tree took AdamW on a CPU twice the time: the moments were
    computed in two loops.
    """

    def skip() -> TrainState:
        return replace(state, step=state.step + 1, skipped=replace(state.skipped, total=state.skipped.total + 1))

    return jax.lax.cond(finite, lambda: apply_gradients(optimizer, state, grads, ema_decay), skip)


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
    algorithm: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: jax.Array,
    parts: int = 1,
    ema_decay: float | None = None,
    poison: Array | None = None,
    pack: Pack | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of pretraining, supervised fine-tuning or reward modelling; `parts` and `pack` as in `gradients`.

    Skipped where its loss or the norm of its gradient is not finite. `poison`, in tests of that, multiplies the
    gradient. `updates` among the metrics is how many updates the optimizer had taken before.
    """
    grads, metrics = gradients(algorithm, state.params, batch, key, parts, pack)
    if poison is not None:
        grads = jax.tree.map(lambda g: poison.astype(g.dtype) * g, grads)
    norm, updates = optax.tree.norm(grads), state.step - state.skipped.total
    finite = all_finite(metrics["loss/total"], norm)
    state = apply_if_finite(finite, optimizer, state, grads, ema_decay)
    state, counts = _counted(state, (~finite).astype(jnp.int32), 1)
    return state, metrics | counts | {"grad/norm": norm, "tokens": batch.real_tokens(), "updates": updates}


def online_update(
    algorithm: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    experience: Any,
    pretraining: Any,
    key: jax.Array,
    *,
    epochs: int,
    minibatches: int,
    parts: int = 1,
    pack: Pack | None = None,
    group: int = 1,
    kl_stop: float | None = None,
    ema_decay: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """`epochs` passes over the experience, reshuffled each time, `minibatches` steps a pass, as one scan.

    `pretraining` (None without ptx) holds the sequences of all the steps. A minibatch is taken in `parts` equal parts,
    or as `pack` lays it out; each `group` rows next to each other stay together. Once the approximate KL of a step
    exceeds `kl_stop`, the steps that are left do nothing.

    A step is skipped where a number of its minibatch (scores, log-probabilities, advantages, returns), its loss or the
    norm of a gradient is not finite. Metrics are means over the steps that were taken: NaN when there was none.
    """
    size = jax.tree.leaves(experience)[0].shape[0]
    steps = epochs * minibatches
    shuffle_key, step_key = jax.random.split(key)
    order = jax.vmap(lambda k: jax.random.permutation(k, size // group))(jax.random.split(shuffle_key, epochs))
    order = order[:, :, None] * group + jnp.arange(group, dtype=jnp.int32)[None, None, :]
    order = order.reshape(steps, size // minibatches)
    extra = jax.tree.map(lambda x: _split(x, steps), pretraining)
    updates = state.step - state.skipped.total

    def take_step(state, rows, extra, key):
        minibatch = jax.tree.map(lambda x: x[rows], experience)
        batch = MixedBatch(minibatch, extra) if isinstance(algorithm, Mix) else minibatch
        grads, metrics = gradients(algorithm, state.params, batch, key, parts, pack)
        norms = {f"grad/{name}_norm": optax.tree.norm(tree) for name, tree in grads.items()}
        finite = all_finite(minibatch, metrics["loss/total"], metrics["policy/approxkl_avg"], norms)
        return apply_if_finite(finite, optimizer, state, grads, ema_decay), (metrics | norms, finite)

    take_step = jax.jit(take_step, inline=True)  # traced once, however often it is asked for

    def body(carry, inputs):
        state, running = carry
        rows, extra, key = inputs
        if kl_stop is None:
            state, (metrics, finite) = take_step(state, rows, extra, key)
            return (state, running), (metrics, finite, running)
        shapes = jax.eval_shape(take_step, state, rows, extra, key)[1]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, (metrics, finite) = jax.lax.cond(
            running, lambda: take_step(state, rows, extra, key), lambda: (state, nothing)
        )
        within = ~finite | (metrics["policy/approxkl_avg"] <= kl_stop)  # a step that was skipped moved nothing
        return (state, running & within), (metrics, finite, running)

    inputs = (order, extra, jax.random.split(step_key, steps))
    (state, _), (metrics, finite, ran) = jax.lax.scan(body, (state, jnp.bool_(True)), inputs)
    taken = ran.sum().astype(jnp.float32)
    learned = (finite & ran).sum().astype(jnp.float32)
    means = {name: jnp.where(finite, values, 0.0).sum() / learned for name, values in metrics.items()}
    means["policy/first_minibatch_ratio_err"] = metrics["val/ratio_err"][0]
    means["policy/epochs_run"] = taken / minibatches
    state, counts = _counted(state, (ran & ~finite).sum(), ran.sum())
    return state, means | counts | {"updates": updates}
