"""The values that flow through a run. Shapes: B sequences, T tokens, P prompt tokens, R response tokens, K candidates.

Prompt and response stay apart, so that no algorithm slices a sequence at an offset. Masks are True on real tokens and
are made from lengths, never from token ids.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = Any  # nested dicts of arrays
_UNSCORED: Any = None  # fields of a rollout that only `scored` fills in


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """Packed sequences for language modelling.

    `segments` numbers the documents of a row from 1; 0 is padding. `loss_mask` marks the tokens that are targets. Where
    `most` is known, no row has more of them. Where there are `prefixes`, a token also sees the segment of that number,
    before its own: several responses of a row go on from one prompt.

    Example: the prompt 5 6 7 with the responses 8 1 and 9 1, read once. A response begins with the prompt's last token,
    so that what predicts its first token is there for each of them; `most` is 4.

        tokens     5 6 7 8 1 7 9 1
        segments   1 1 2 2 2 3 3 3
        prefixes   1 1 1 1 1 1 1 1
        positions  0 1 2 3 4 2 3 4
        loss_mask  . . . x x . x x
    """

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    prefixes: Int[Array, "B T"] | None = None
    routes: Int[Array, "B T L K"] | None = None  # experts that were chosen while these tokens were sampled; -1: unknown
    most: int | None = field(default=None, metadata={"static": True})

    def real_tokens(self) -> Int[Array, ""]:
        """Tokens that are not padding."""
        return (self.segments > 0).sum()

    def unrouted(self) -> "TokenBatch":
        """The same for another model than the one that sampled them."""
        return self if self.routes is None else replace(self, routes=None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What the routers of L layers did with the real tokens of a batch: sums, so that the parts of a batch add up.

    `assigned` counts (token, expert) pairs before any is `dropped`; `squared_z` sums logsumexp(router logits)^2.
    """

    assigned: Float[Array, "*L E"]
    probabilities: Float[Array, "*L E"]
    squared_z: Float[Array, "*L"]
    dropped: Float[Array, "*L"]
    tokens: Float[Array, "*L"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RankedBatch:
    """K ranked responses per prompt (rank 1 best, equal = tie); `mask` marks the candidates that are present.

    A row of tokens is a prompt and its response joined; the first `prompt_lengths` tokens are the prompt.
    """

    tokens: Int[Array, "B K T"]
    token_mask: Bool[Array, "B K T"]
    ranks: Int[Array, "B K"]
    mask: Bool[Array, "B K"]
    prompt_lengths: Int[Array, "B"]

    def real_tokens(self) -> Int[Array, ""]:
        """Tokens that are not padding."""
        return (self.token_mask & self.mask[:, :, None]).sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRanking:
    """A `RankedBatch` by token of packed rows; `mask` marks the candidates that are in these rows.

    `candidate` numbers that of each target, from 0 to B·K - 1.
    """

    batch: TokenBatch
    candidate: Int[Array, "*N R T"]
    ranks: Int[Array, "*N B K"]
    mask: Bool[Array, "*N B K"]

    def of_candidates(self, x: Float[Array, "R T"]) -> Float[Array, "B K"]:
        """Σ over the targets of each candidate; 0 where it has none in these rows."""
        nobody = self.ranks.size
        at = jnp.where(self.batch.loss_mask, self.candidate, nobody)
        return jnp.zeros(nobody, x.dtype).at[at.reshape(-1)].add(x.reshape(-1), mode="drop").reshape(self.ranks.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts. `uid` names the sample, not the prompt: equal uids and keys draw equal responses."""

    tokens: Int[Array, "B P"]
    mask: Bool[Array, "B P"]
    uid: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses; what `score` adds is None until then.

    `response_mask` includes the token that ended the response; `finished` says whether there was one. Speculative
    decoding counts for each row the model's calls after the prompt's, draft tokens, and those that were right.
    """

    prompt: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    response: Int[Array, "B R"]
    response_mask: Bool[Array, "B R"]
    finished: Bool[Array, "B"]
    sampled_log_probs: Float[Array, "B R"]
    log_probs: Float[Array, "B R"] = _UNSCORED
    ref_log_probs: Float[Array, "B R"] = _UNSCORED
    values: Float[Array, "B R"] = _UNSCORED
    scores: Float[Array, "B"] = _UNSCORED
    top_ids: Int[Array, "B R K"] | None = None  # the likeliest tokens of each position, where that was asked for
    top_log_probs: Float[Array, "B R K"] | None = None
    counts: Int[Array, "B 3"] | None = None
    routes: Int[Array, "B J L K"] | None = None  # of prompt and response joined, as `TokenBatch` has them
    rerouted: Float[Array, "B R"] | None = None  # the share of layers that route a token otherwise; -1: not known
    rewards: dict[str, Float[Array, "B"]] | None = None  # by name, where a recipe lists what its scores are made of
    kept: Bool[Array, "B"] | None = None  # the responses that are learned from, where some may be dropped

    def scored(self, log_probs: Array, ref_log_probs: Array, values: Array, scores: Array) -> "Rollout":
        """The same rollout with what the models say of it."""
        return replace(self, log_probs=log_probs, ref_log_probs=ref_log_probs, values=values, scores=scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """What the update reads: a rollout with its advantages and returns."""

    rollout: Rollout
    advantages: Float[Array, "B R"]
    returns: Float[Array, "B R"]

    @property
    def rows(self) -> Rollout:
        """What functions of a model read of it."""
        return self.rollout

    @property
    def mask(self) -> Bool[Array, "B R"]:
        return self.rollout.response_mask

    @property
    def log_probs(self) -> Float[Array, "B R"]:
        return self.rollout.log_probs

    @property
    def ref_log_probs(self) -> Float[Array, "B R"]:
        return self.rollout.ref_log_probs

    @property
    def values(self) -> Float[Array, "B R"]:
        return self.rollout.values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenExperience:
    """Experience by token of packed rows: prompts and responses joined, response tokens marked."""

    batch: TokenBatch
    log_probs: Float[Array, "*N T"]
    ref_log_probs: Float[Array, "*N T"]
    values: Float[Array, "*N T"]
    advantages: Float[Array, "*N T"]
    returns: Float[Array, "*N T"]

    @property
    def rows(self) -> TokenBatch:
        """What functions of a model read of it."""
        return self.batch

    @property
    def mask(self) -> Bool[Array, "*N T"]:
        return self.batch.loss_mask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skipped:
    """Updates that were left out because a number was not finite: in all, and the last steps that learned nothing."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]


def none_skipped() -> Skipped:
    """At the start of a stage."""
    return Skipped(jnp.int32(0), jnp.int32(0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and, where kept, their exponential moving average.

    `step` counts updates, those that were skipped too: batches and keys follow it. The learning rate follows the
    optimizer's own count, `step - skipped.total`.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    average: Params | None = None
    skipped: Skipped = field(default_factory=none_skipped)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnlineState:
    """A training state with the KL coefficient; `train.params` is {"policy": …, "value": …}.

    `iteration` counts rounds of sampling and updating; `train.step` counts the optimizer steps in them.
    """

    train: TrainState
    kl_coef: Float[Array, ""]
    iteration: Int[Array, ""]
