"""Objectives over models: what the stages train policies and reward models on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import Mix, OnlineAlgorithm
from rlhfjax.algorithms.dpo import Dpo
from rlhfjax.algorithms.language_modelling import LanguageModelling, RoutedLanguageModelling
from rlhfjax.algorithms.likelihood import (
    cross_entropy,
    token_log_probs,
    token_scores,
)
from rlhfjax.algorithms.multi_token import MultiTokenPrediction, Sums, head_sums
from rlhfjax.algorithms.reward_modelling import RewardModelling
from rlhfjax.config import schema
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.types import Params, RankedBatch, TokenBatch, TokenRanking


def language_modelling(
    model: SequenceModel,
    dropout: float = 0.0,
    decoder: Callable[[Params], Params] = lambda params: params,
    label_smoothing: float = 0.0,
) -> LanguageModelling:
    """The language-modelling loss of a decoder; of responses given their prompts for an encoder–decoder.

    `decoder` picks the parameters of the model out of those that are trained.
    """

    def total(params, batch, key):
        params = decoder(params)
        hidden = model.batch_hidden(params, batch, dropout, key)
        return cross_entropy(model, params, batch, hidden, label_smoothing)

    return LanguageModelling(total)


def training_loss(
    model: SequenceModel,
    dropout: float = 0.0,
    decoder: Callable[[Params], Params] = lambda params: params,
    label_smoothing: float = 0.0,
    ahead: bool = False,
) -> LanguageModelling | RoutedLanguageModelling | MultiTokenPrediction:
    """What a policy is trained on: the language-modelling loss and, with experts, the losses of their routers.

    With `ahead` also the loss of the heads that predict further ahead; the model has some, and no experts.
    """
    if ahead:
        return _multi_token(model, dropout, decoder, label_smoothing)
    if isinstance(model, EncoderDecoder) or not model.config.experts:
        return language_modelling(model, dropout, decoder, label_smoothing)

    def total(params, batch, key):
        params = decoder(params)
        inputs = batch.tokens, batch.positions, batch.segments
        hidden, routing = model.hidden_and_routing(params, *inputs, dropout, key)
        return cross_entropy(model, params, batch, hidden, label_smoothing), routing

    c = model.config
    return RoutedLanguageModelling(total, c.load_balancing_coef, c.router_z_coef)


def _multi_token(model: Any, dropout: float, decoder: Callable, smoothing: float) -> MultiTokenPrediction:
    def sums(params, batch, key):
        params = decoder(params)
        hidden = model.batch_hidden(params, batch, dropout, key)
        next_token = cross_entropy(model, params, batch, hidden, smoothing)
        return Sums(next_token, *head_sums(model, params, batch, hidden))

    return MultiTokenPrediction(sums, model.config.mtp_heads, model.config.mtp_coef)


def reward_modelling(model: SequenceModel, loss: schema.RankingLoss, dropout: float = 0.0) -> RewardModelling:
    """The ranking loss of a scalar model, of candidates in rows of their own or packed with their prompt."""

    def scores(params, batch: RankedBatch | TokenRanking, key):
        if isinstance(batch, TokenRanking):
            return batch.of_candidates(token_scores(model, params, batch.batch, dropout, key))
        flat = (-1, batch.tokens.shape[-1])
        prompts = jnp.repeat(batch.prompt_lengths, batch.ranks.shape[1])
        rows = model.scores(params, batch.tokens.reshape(flat), batch.token_mask.reshape(flat), prompts, dropout, key)
        return rows.reshape(batch.ranks.shape)

    return RewardModelling(scores, loss.kind, loss.margin)


def preference_optimisation(model: SequenceModel, loss: schema.PreferenceLoss) -> Dpo:
    """DPO of a model; its parameters have those of the reference beside them, under `reference`.

    Dropout is off: the ratio to the reference would be noise.
    """

    def log_probs(params: Params, batch: RankedBatch | TokenRanking) -> jax.Array:
        if isinstance(batch, TokenRanking):
            return batch.of_candidates(token_log_probs(model, params, batch.batch)[0])
        each, _ = token_log_probs(model, params, joined_rows(batch))
        return each.sum(axis=1).reshape(batch.ranks.shape)

    def of_policy(params: Params, batch: RankedBatch | TokenRanking, key: jax.Array | None) -> jax.Array:
        return log_probs({name: tree for name, tree in params.items() if name != "reference"}, batch)

    def of_reference(params: Params, batch: RankedBatch | TokenRanking) -> jax.Array:
        return log_probs(params["reference"], batch)

    return Dpo(of_policy, of_reference, loss.beta, loss.kind, loss.label_smoothing)


def joined_rows(batch: RankedBatch) -> TokenBatch:
    """One row a candidate, prompt and response joined; response tokens are the targets."""
    length, candidates = batch.tokens.shape[-1], batch.ranks.shape[1]
    mask = (batch.token_mask & batch.mask[:, :, None]).reshape(-1, length)
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], mask.shape)
    response = slots >= jnp.repeat(batch.prompt_lengths, candidates)[:, None]
    return TokenBatch(batch.tokens.reshape(-1, length), mask.astype(jnp.int32), slots, mask & response)


def policy_log_probs(
    policy: SequenceModel, temperature: float, entropy_gradient: bool = False
) -> Callable[[Params, TokenBatch], Any]:
    """Log-probabilities and entropies of a policy at the temperature of sampling, as online algorithms read them."""
    return lambda params, rows: token_log_probs(
        policy, params["policy"], rows, temperature, entropy_gradient=entropy_gradient
    )


def with_pretraining(algorithm: OnlineAlgorithm, ptx: schema.Ptx | None, policy: SequenceModel) -> Any:
    """An online algorithm, with the loss of pretraining in the same gradient where the recipe has it (PPO-ptx)."""
    if ptx is None:
        return algorithm
    second = training_loss(policy, decoder=_policy)
    return Mix(algorithm, ptx.coef, second, shared=_policy)


def _policy(params: Params) -> Params:
    return params["policy"]
