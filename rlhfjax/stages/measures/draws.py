"""Responses that a stage draws to measure by them, each within a budget of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rlhfjax.config import schema
from rlhfjax.config.recipe import online
from rlhfjax.data.batches import left_padded
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import SequenceModel
from rlhfjax.sharding.sampling import sampling_shards
from rlhfjax.stages.models import plain_sampling, sampling_params
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.types import Params, PromptBatch, Rollout


@dataclass(frozen=True)
class Draws:
    """Prompts, how to sample responses to them, and the most tokens of each response.

    The first `count` are those that were asked for; others fill up the rows of the last devices.
    """

    prompts: PromptBatch
    sampling: SamplingParams
    budgets: Int[Array, "B"]
    count: int

    def of(self, model: SequenceModel, params: Params, key: jax.Array) -> Rollout:
        """A response to each prompt. Those that reach their budget have not ended, as at `max_new_tokens`."""
        made = generate(model, params, self.prompts, key, self.sampling)
        slots = jnp.arange(self.sampling.max_new_tokens, dtype=jnp.int32)
        mask = made.response_mask & (slots[None, :] < self.budgets[:, None])
        return replace(
            made,
            response=jnp.where(mask, made.response, self.sampling.pad_id),
            response_mask=mask,
            finished=made.finished & (mask == made.response_mask).all(axis=1),
            sampled_log_probs=jnp.where(mask, made.sampled_log_probs, 0.0),
        )


def draws_of(
    sampled: schema.Sampling | None,
    tokenizer: AnyTokenizer,
    prompts: Sequence[Sequence[int]],
    context: int,
    length: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Draws:
    """As `sampled` says, within `context` tokens; without it as the policy is, up to `length`.

    The budget of a response depends on its own prompt alone: `length` or `context` less the prompt, and no more than
    `max_new_tokens`. There are as many rows as the devices of a `mesh` can share evenly.
    """
    count = len(prompts)
    if mesh is not None:
        prompts = [*prompts, *[prompts[-1]] * (-count % sampling_shards(mesh))]
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    if sampled:
        sampling = replace(sampling_params(sampled, tokenizer), speculation=None)
        budgets = np.minimum(sampling.max_new_tokens, context - lengths)
    else:
        budgets = length - lengths
        sampling = plain_sampling(int(budgets.max()), tokenizer)
    tokens, mask = left_padded(prompts, tokenizer.pad_id)
    places = jnp.arange(len(tokens), dtype=jnp.int32)
    return Draws(PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), places), sampling, jnp.asarray(budgets), count)


def last_sampling(run: schema.Run) -> schema.Sampling | None:
    """How the last online stage of a recipe will sample; None without one."""
    stages = online(run)
    return stages[-1][1].sampling if stages else None
