"""Contracts of algorithms, offline and online: what a loop asks of them, and how objectives are put together.

A loss adds up over the parts of a batch, so that micro batches, packed rows and devices do not change it: `weight` is
the count of the whole batch by which each part is normalised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhfjax.types import Experience, Params, Rollout

Metrics = dict[str, Array]
Gradients = tuple[Params, Metrics]  # of a loss, with its metrics; `loss/total` among them is that loss


class Objective(Protocol):
    """A loss over batches. Algorithms are frozen dataclasses that name it as their base."""

    # survey(params, part, key), where a loss needs sums over the whole batch that depend on the parameters: those of
    # the parts are added to `weight` before any loss is taken.
    survey: Callable[..., Any] | None = None

    def weight(self, batch: Any) -> Any:
        """What normalises the loss, of the whole batch."""
        ...

    def loss(
        self, params: Params, batch: Any, weight: Any, key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """The share of this part in the loss over the batch that `weight` is of, and its metrics."""
        ...


class OnlineAlgorithm(Objective, Protocol):
    """An objective over what the policy itself has sampled.

    `params` is {"policy": …} and whatever else the algorithm trains, such as {"value": …}. `rows` are packed rows
    (`TokenBatch`) of prompts and responses, of which the response tokens are the targets.
    """

    # The policy's log-probability of each target, and the entropy of the distribution it is drawn from, nats.
    log_probs: Callable[[Params, Any], tuple[Array, Array]]
    # Responses to one prompt that lie next to each other and stay together.
    group: int

    def predict(self, params: Params, rows: Any) -> tuple[Array, Array, Array]:
        """Log-probabilities, entropies, and the state value at each target; 0 without a value model."""
        ...

    def estimate(self, rollout: Rollout, kl_coef: Float[Array, ""]) -> tuple[Experience, Metrics]:
        """Scored responses to advantages and returns, over the whole batch of an iteration."""
        ...

    def informative(self, rollout: Rollout) -> Bool[Array, "G"]:
        """Which groups of responses teach something; dynamic sampling draws more in the place of the others."""
        return jnp.ones(rollout.finished.shape[0] // self.group, bool)

    def divergence(self, metrics: Mapping[str, Array]) -> Array:
        """Approximate KL of the policy that sampled to the one in training, among the metrics of a loss."""
        return metrics["policy/approxkl_avg"]

    def at_first(self, metrics: Mapping[str, Array]) -> Metrics:
        """What is told of the first minibatch alone, where the policy still is the one that sampled."""
        return {"policy/first_minibatch_ratio_err": metrics["val/ratio_err"]}


class MixedBatch(NamedTuple):
    """One batch for each of the two losses; they may have different sizes."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Mix:
    """`first` + `coef` x `second`: PPO-ptx mixes in the loss of pretraining (Ouyang et al. 2022, eq. 2).

    Each is normalised by its own count, and the gradients are added before clipping. Both train the part of the
    parameters that `shared` picks.
    """

    first: Any
    coef: float
    second: Any
    shared: Callable[[Params], Params] = lambda params: params

    def mixed(self, first: Gradients, second: Gradients) -> Gradients:
        """The sum of two gradients, with the ratio of their norms over what both train."""
        (grads, metrics), (other, other_metrics) = first, second
        other = jax.tree.map(lambda g: self.coef * g, other)
        ratio = optax.tree.norm(other) / jnp.maximum(optax.tree.norm(self.shared(grads)), 1e-12)
        total = metrics["loss/total"] + self.coef * other_metrics["loss/total"]
        mixed = {"loss/ptx": other_metrics["loss/train"], "grad/ptx_to_ppo_norm_ratio": ratio, "loss/total": total}
        return jax.tree.map(jnp.add, grads, other), metrics | mixed


def online_part(objective: Any) -> OnlineAlgorithm:
    """The algorithm that learns from rollouts, without what is mixed into its gradient."""
    return objective.first if isinstance(objective, Mix) else objective


@dataclass(frozen=True)
class Restricted:
    """An objective as a function of the parameters that are trained: p -> loss(whole(p), …).

    `whole` makes all parameters from the trained ones; the others are there, and have no gradient.
    """

    objective: Any
    whole: Callable[[Params], Params]

    def weight(self, batch: Any) -> Any:
        return self.objective.weight(batch)

    def loss(
        self, params: Params, batch: Any, weight: Any, key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        return self.objective.loss(self.whole(params), batch, weight, key)

    @property
    def survey(self) -> Callable[..., Any] | None:
        survey = self.objective.survey
        return survey and (lambda params, *args: survey(self.whole(params), *args))

    def divergence(self, metrics: Mapping[str, Array]) -> Array:
        return self.objective.divergence(metrics)

    def at_first(self, metrics: Mapping[str, Array]) -> Metrics:
        return self.objective.at_first(metrics)


def restrict(objective: Any, whole: Callable[[Params], Params]) -> Any:
    """`Restricted`; of a mix, both of its parts."""
    if isinstance(objective, Mix):
        both = restrict(objective.first, whole), restrict(objective.second, whole)
        return replace(objective, first=both[0], second=both[1])
    return Restricted(objective, whole)
