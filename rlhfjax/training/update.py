"""Gradients over micro batches, one optimizer step, and PPO's epochs x minibatches as one scan."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlhfjax.algorithms.mix import Mix, MixedBatch
from rlhfjax.types import Params, TrainState

Pack = Callable[[Any], tuple[Any, Array]]


@jax.named_scope("gradients")  # as a trace shows it
def gradients(
    algorithm: Any, params: Params, batch: Any, key: jax.Array, parts: int = 1, pack: Pack | None = None
) -> tuple[Params, dict[str, Array]]:
    """Gradient of the loss over `batch`, taken in `parts` equal parts one after the other.

    `pack(batch)` gives the parts of an experience instead, stacked, and how many of them hold anything. The loss is
    normalised by the count of the whole batch, so the result does not depend on either.
    """
    if isinstance(algorithm, Mix):
        return _mixed_gradients(algorithm, params, batch, key, parts, pack)
    inputs, used = pack(batch) if pack else (batch, parts)
    weight = algorithm.weight(inputs)

    def part_gradients(part, key):
        (_, metrics), grads = jax.value_and_grad(algorithm.loss, has_aux=True)(params, part, weight, key)
        return grads, metrics

    if pack is None and parts == 1:
        return part_gradients(batch, key)
    if pack is None:
        inputs = jax.tree.map(lambda x: _split(x, parts), batch)
    inputs = inputs, jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
    if len(inputs[1]) == 1:
        return part_gradients(*jax.tree.map(lambda x: x[0], inputs))
    if survey := getattr(algorithm, "survey", None):  # with the same keys, it sees what the losses will see
        weight |= _summed(partial(survey, params), (inputs[0], jax.random.clone(inputs[1])), used)
    return _summed(part_gradients, inputs, used)


def _summed(function: Callable[..., Any], inputs: Any, count: int | Array) -> Any:
    """Σ function(*inputs[i]) over the first `count`, one after the other."""
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
    metrics = metrics | {"loss/ptx": second_metrics["loss/train"], "grad/ptx_to_ppo_norm_ratio": ratio}
    return jax.tree.map(jnp.add, first, second), metrics


@jax.named_scope("optimizer")
def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params, ema_decay: float | None = None
) -> TrainState:
    """One optimizer step; the average moves as average = decay x average + (1 - decay) x params."""
    updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None and ema_decay is not None:
        tracked = params.get("policy", params)
        average = optax.incremental_update(tracked, average, 1.0 - ema_decay)
    return TrainState(params, opt_state, state.step + 1, average)


def offline_step(
    algorithm: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: jax.Array,
    parts: int = 1,
    ema_decay: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of pretraining, supervised fine-tuning or reward modelling."""
    grads, metrics = gradients(algorithm, state.params, batch, key, parts)
    metrics = metrics | {"grad/norm": optax.tree.norm(grads), "tokens": batch.real_tokens()}
    return apply_gradients(optimizer, state, grads, ema_decay), metrics


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
    kl_stop: float | None = None,
    ema_decay: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """`epochs` passes over the experience, reshuffled each time, `minibatches` steps a pass, as one scan.

    `pretraining` (None without ptx) holds the sequences of all the steps. A minibatch is taken in `parts` equal parts,
    or as `pack` lays it out. Once the approximate KL of a step exceeds `kl_stop`, the steps that are left do nothing.
    Metrics are means over the steps that ran.
    """
    size = jax.tree.leaves(experience)[0].shape[0]
    steps = epochs * minibatches
    shuffle_key, step_key = jax.random.split(key)
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(shuffle_key, epochs))
    order = order.reshape(steps, size // minibatches)
    extra = jax.tree.map(lambda x: _split(x, steps), pretraining)

    def take_step(state, rows, extra, key):
        minibatch = jax.tree.map(lambda x: x[rows], experience)
        batch = MixedBatch(minibatch, extra) if isinstance(algorithm, Mix) else minibatch
        grads, metrics = gradients(algorithm, state.params, batch, key, parts, pack)
        norms = {f"grad/{name}_norm": optax.tree.norm(tree) for name, tree in grads.items()}
        return apply_gradients(optimizer, state, grads, ema_decay), metrics | norms

    shapes = jax.eval_shape(take_step, state, order[0], jax.tree.map(lambda x: x[0], extra), step_key)[1]
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry, inputs):
        state, running = carry
        rows, extra, key = inputs
        if kl_stop is None:
            state, metrics = take_step(state, rows, extra, key)
            return (state, running), (metrics, running)
        state, metrics = jax.lax.cond(running, lambda: take_step(state, rows, extra, key), lambda: (state, nothing))
        return (state, running & (metrics["policy/approxkl_avg"] <= kl_stop)), (metrics, running)

    inputs = (order, extra, jax.random.split(step_key, steps))
    (state, _), (metrics, ran) = jax.lax.scan(body, (state, jnp.bool_(True)), inputs)
    taken = ran.sum().astype(jnp.float32)
    means = {name: values.sum() / taken for name, values in metrics.items()}
    means["policy/first_minibatch_ratio_err"] = metrics["val/ratio_err"][0]
    means["policy/epochs_run"] = taken / minibatches
    return state, means
