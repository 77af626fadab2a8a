"""AdamW, Adafactor, Lion and Muon with the schedules of the recipe."""

from collections.abc import Hashable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from rlhfjax.config.sections import Optimizer

MUON_BETA = 0.95  # momentum and update size of Liu et al. 2025, whose rates are those of AdamW
MUON_RMS = 0.2
FACTORED = 128  # rows and columns from which Adafactor factors a matrix


def learning_rate(
    settings: Optimizer, total_steps: int, peak: float | None = None, width: int | None = None
) -> optax.Schedule:
    """Linear warm-up from `warmup_from` x peak, then constant, linear or cosine to `final` x peak.

    `noam` needs the model's width d: peak x d^-0.5 x min(s^-0.5, s x warmup_steps^-1.5) at step s = 1, 2, … (Vaswani et
    al. 2017, eq. 3).
    """
    peak = settings.lr if peak is None else peak
    if settings.schedule == "noam":
        assert width is not None
        return partial(_noam, factor=peak * width**-0.5, warmup=settings.warmup_steps)
    rest = max(total_steps - settings.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * settings.final, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, settings.final),
    }[settings.schedule]
    if not settings.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak * settings.warmup_from, peak, settings.warmup_steps)
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def _noam(count: Any, factor: float, warmup: int) -> jax.Array:
    step = jnp.asarray(count, jnp.float32) + 1.0
    return factor * jnp.minimum(step**-0.5, step * warmup**-1.5)


def make_optimizer(
    settings: Optimizer, total_steps: int, peak: float | None = None, width: int | None = None
) -> optax.GradientTransformation:
    """Global-norm clipping, the direction of `kind`, decoupled weight decay of matrices, the scheduled learning rate.

    p <- p - lr (direction + weight_decay p), as Loshchilov & Hutter 2019 decay, whatever the direction.
    """
    steps = optax.chain(
        direction(settings),
        optax.add_decayed_weights(settings.weight_decay, _matrices),
        optax.scale_by_learning_rate(learning_rate(settings, total_steps, peak, width)),
    )
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)
    return optax.chain(clip, steps)


def direction(settings: Optimizer) -> optax.GradientTransformation:
    """Where a step goes, before its size.

    - `adamw`: m / (sqrt(v) + eps) (Kingma & Ba 2015).
    - `lion`: sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2).
    - `adafactor`: g / sqrt(v), with v of a large matrix from the means of its rows and columns, clipped to a root mean
      square of 1 (Shazeer & Stern 2018, algorithms 4 and 5); neither momentum nor relative step sizes.
    - `muon`: the momentum of matrices inside blocks, orthogonalised, 0.2 sqrt(max(inputs, outputs)) in size (Liu et al.
      2025, eq. 4); AdamW for the rest.

    The ending `_bf16` keeps the first moment in bfloat16.
    """
    kind, _, moments = settings.kind.partition("_")
    mu_dtype = jnp.bfloat16 if moments else None
    adam = optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps, mu_dtype=mu_dtype)
    if kind == "adamw":
        return adam
    if kind == "lion":
        return optax.scale_by_lion(b1=settings.b1, b2=settings.b2, mu_dtype=mu_dtype)
    if kind == "adafactor":
        return _over_matrices(
            optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED), optax.clip_by_block_rms(1.0))
        )
    muon = optax.chain(
        scale_by_muon(beta=MUON_BETA, mu_dtype=mu_dtype, weight_dimension_numbers=_dimension_numbers), _by_size
    )
    each: dict[Hashable, optax.GradientTransformation] = {"matrices": muon, "rest": adam}
    return optax.partition(each, partial(_map_with_path, _label))


def matrix_axes(path: tuple, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The input and the output axes of a linear inside the blocks, by its path; None for every other parameter.

    Axes in front of them (layers, experts) count matrices, each one of its own. Routers choose: they are no linears.
    """
    names = [str(getattr(entry, "key", entry)) for entry in path]
    if "blocks" not in names or names[-1] not in ("kernel", "lora_a", "lora_b") or "router" in names:
        return None
    linear, leaf = names[-2], names[-1]
    axes = tuple(range(1 + ("experts" in names), ndim))  # behind layer and expert
    if leaf == "lora_a":
        return axes[:-1], axes[-1:]
    inputs = 2 if leaf == "kernel" and linear == "out" else 1  # attention's output reads heads x head_dim
    return axes[:inputs], axes[inputs:]


def _map_with_path(function, tree):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path, leaf), tree)


def _label(path: tuple, leaf: jax.Array) -> str:
    return "rest" if matrix_axes(path, leaf.ndim) is None else "matrices"


def _dimension_numbers(params):
    return _map_with_path(lambda path, leaf: MuonDimensionNumbers(*_axes(path, leaf)), params)


def _axes(path: tuple, leaf: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = matrix_axes(path, leaf.ndim)
    assert axes is not None  # the partition gives Muon nothing else
    return axes


def _muon_size(path: tuple, update: jax.Array) -> jax.Array:
    inputs, outputs = ([update.shape[axis] for axis in axes] for axes in _axes(path, update))
    return MUON_RMS * max(prod(inputs), prod(outputs)) ** 0.5 * update


_by_size = optax.stateless(lambda updates, _: _map_with_path(_muon_size, updates))


def _as_matrices(path: tuple, leaf: jax.Array) -> jax.Array:
    """A linear inside the blocks that is large enough as [..., inputs, outputs]; heads and their width are one axis."""
    if (axes := matrix_axes(path, leaf.ndim)) is None:
        return leaf
    inputs, outputs = (prod(leaf.shape[axis] for axis in group) for group in axes)
    return leaf if min(inputs, outputs) < FACTORED else leaf.reshape(*leaf.shape[: axes[0][0]], inputs, outputs)


def _over_matrices(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` where every linear is a matrix, so that rows and columns are those of what multiplies."""

    def update(updates, state, params=None):
        flat = _map_with_path(_as_matrices, updates)
        made, state = transform.update(flat, state, _map_with_path(_as_matrices, params))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), made, updates), state

    return optax.GradientTransformation(lambda params: transform.init(_map_with_path(_as_matrices, params)), update)


def _matrices(params):
    # Norm scales and biases are not decayed. Inside `blocks` every leaf has the layer as an additional first axis.
    return _map_with_path(
        lambda path, leaf: path[-1].key in ("kernel", "embedding", "lora_a", "lora_b") and leaf.ndim > 1, params
    )
