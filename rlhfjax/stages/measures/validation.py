"""Measures of validation: held-out loss, ranked pairs in their order, the reward model's score of samples."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms.dpo import Dpo
from rlhfjax.algorithms.language_modelling import predicted
from rlhfjax.algorithms.reward_modelling import RewardModelling
from rlhfjax.config import schema
from rlhfjax.data.by_step import Batches
from rlhfjax.data.pipeline import Reader
from rlhfjax.host_memory import on_device
from rlhfjax.models import SequenceModel
from rlhfjax.sharding import place_share
from rlhfjax.sharding.sampling import sampling_on
from rlhfjax.stages.measures.draws import draws_of
from rlhfjax.stages.objectives import language_modelling
from rlhfjax.stages.starts import at_rest
from rlhfjax.training.checkpoint import find_checkpoint, load_model
from rlhfjax.training.state import abstract
from rlhfjax.training.update import Pack, summed
from rlhfjax.types import Params


@dataclass(frozen=True)
class Meter:
    """The mean over a dataset of what `total(params, batch, rows)` gives the sum and the count of, batch by batch."""

    total: Any
    mesh: jax.sharding.Mesh

    def __call__(self, params: Params, batches: Batches) -> float:
        sums = [self.total(params, place_share(self.mesh, batch), rows) for batch, rows in batches.once()]
        return float(sum(total for total, _ in sums) / sum(count for _, count in sums))

    def shapes(self, params: Params, batches: Batches) -> tuple:
        """What `total` is called with."""
        batch, rows = next(iter(batches.once()))
        return abstract(params), abstract(place_share(self.mesh, batch)), rows


def loss_meter(mesh: jax.sharding.Mesh, model: SequenceModel) -> Meter:
    """Mean loss over every target token of a dataset, nats per token."""
    algorithm = language_modelling(model)

    @jax.jit
    def total(params, batch, rows):
        counted = jnp.arange(batch.tokens.shape[0]) < rows
        batch = replace(batch, loss_mask=batch.loss_mask & counted[:, None])
        return algorithm.loss(params, batch, jnp.float32(1.0))[0], predicted(batch).sum()

    return Meter(total, mesh)


def reward_meter(
    c: schema.Sft,
    reader: Reader,
    mesh: jax.sharding.Mesh,
    model: SequenceModel,
    sampled: schema.Sampling | None,
    key: jax.Array,
    count: int = 64,
    offload: bool = False,
) -> Callable[[Params], dict[str, float]]:
    """Mean score that the reward model at `reward_model` gives samples for validation prompts (`draws_of`).

    InstructGPT chose its SFT checkpoint by this, not by validation loss (Ouyang et al. 2022, C.1). With `offload` that
    model lies in the hosts' memory in between.
    """
    scorer, reward = load_model(find_checkpoint(str(c.reward_model)), mesh)
    reward = at_rest(reward, offload)
    pairs = reader.demonstration_ids(c.validation, c.batch.length, count, c.batch.refused)
    context = min(model.config.context, scorer.config.context)
    draws = draws_of(sampled, reader.tokenizer, [prompt for prompt, _ in pairs], context, c.batch.length, mesh)

    @jax.jit
    def mean_score(params, reward, key):
        made = sampling_on(mesh, draws.of)(model, params, key)
        parts = (made.prompt, made.prompt_mask, made.response, made.response_mask)
        return scorer.response_scores(on_device(reward), *parts)[: draws.count].mean()

    return lambda params: {"eval/reward_score": float(mean_score(params, reward, key))}


def accuracy_meter(
    mesh: jax.sharding.Mesh, algorithm: RewardModelling | Dpo, pack: Pack | None, metric: str = "train/rm/accuracy"
) -> Meter:
    """Share of the ranked pairs of a dataset that the scores, or implicit rewards, order as people did."""

    @jax.jit
    def total(params, batch, rows):
        counted = jnp.arange(batch.ranks.shape[0]) < rows
        batch = replace(batch, mask=batch.mask & counted[:, None])
        weight = algorithm.weight(batch)
        parts, used = pack(batch) if pack else (jax.tree.map(lambda x: x[None], batch), 1)
        share = summed(lambda part: algorithm.loss(params, part, weight)[1][metric], (parts,), used)
        return share * weight["pairs"], weight["pairs"]

    return Meter(total, mesh)


def named(metric: str, values: dict[str, float]) -> dict[str, float]:
    """One metric per dataset, and their mean under the plain name."""
    if not values:
        return {}
    each = {f"{metric}/{name}": value for name, value in values.items()}
    return each | {metric: float(np.mean(list(values.values())))}
