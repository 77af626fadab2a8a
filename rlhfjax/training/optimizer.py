"""AdamW with the schedules of the recipe."""

from typing import Literal, Protocol

import jax
import optax


class Settings(Protocol):
    """The `optimizer` section of a configuration (see rlhfjax.config.schema.Optimizer)."""

    lr: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    warmup_from: float
    final: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float | None


def learning_rate(settings: Settings, total_steps: int, peak: float | None = None) -> optax.Schedule:
    """Linear warm-up from `warmup_from` x peak, then constant, linear or cosine to `final` x peak."""
    peak = settings.lr if peak is None else peak
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


def make_optimizer(settings: Settings, total_steps: int, peak: float | None = None) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; weight decay on matrices only (Loshchilov & Hutter 2019)."""
    adamw = optax.adamw(
        learning_rate(settings, total_steps, peak),
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
        lambda path, leaf: path[-1].key in ("kernel", "embedding") and leaf.ndim > 1, params
    )
