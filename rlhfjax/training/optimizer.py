"""AdamW with the schedules of the recipe."""

from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax


class Settings(Protocol):
    """The `optimizer` section of a configuration (see rlhfjax.config.schema.Optimizer)."""

    lr: float
    schedule: Literal["constant", "linear", "cosine", "noam"]
    warmup_steps: int
    warmup_from: float
    final: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float | None


def learning_rate(
    settings: Settings, total_steps: int, peak: float | None = None, width: int | None = None
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
    settings: Settings, total_steps: int, peak: float | None = None, width: int | None = None
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; weight decay on matrices only (Loshchilov & Hutter 2019)."""
    adamw = optax.adamw(
        learning_rate(settings, total_steps, peak, width),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=_matrices,
    )
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)
    return optax.chain(clip, adamw)


def _matrices(params):
    # Norm scales and biases are not decayed. Inside `blocks` every leaf has the layer as an additional first axis.
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: path[-1].key in ("kernel", "embedding", "lora_a", "lora_b") and leaf.ndim > 1, params
    )
