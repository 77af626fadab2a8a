"""Algorithms over the models that there are: what a policy and a reward model are trained on."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rlhfjax.algorithms import LanguageModelling, RewardModelling, RoutedLanguageModelling
from rlhfjax.algorithms.likelihood import cross_entropy, token_scores
from rlhfjax.algorithms.multi_token import MultiTokenPrediction, Sums, head_sums
from rlhfjax.config import schema
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.types import Params, RankedBatch, TokenRanking


def language_modelling(
    model: SequenceModel,
    dropout: float = 0.0,
    decoder: Callable[[Params], Params] = lambda params: params,
    label_smoothing: float = 0.0,
    gather: bool = True,
) -> LanguageModelling:
    """The language-modelling loss of a decoder; of responses given their prompts for an encoder–decoder.

    `decoder` picks the parameters of the model out of those that are trained. `gather` is for one device.
    """

    def total(params, batch, key):
        params = decoder(params)
        hidden = model.batch_hidden(params, batch, dropout, key)
        return cross_entropy(model, params, batch, hidden, label_smoothing, gather=gather)

    return LanguageModelling(total)


def training_loss(
    model: SequenceModel,
    dropout: float = 0.0,
    decoder: Callable[[Params], Params] = lambda params: params,
    label_smoothing: float = 0.0,
    gather: bool = True,
    ahead: bool = False,
) -> LanguageModelling | RoutedLanguageModelling | MultiTokenPrediction:
    """What a policy is trained on: the language-modelling loss and, with experts, the losses of their routers.

    With `ahead` also the loss of the heads that predict further ahead; the model has some, and no experts.
    """
    if ahead:
        return _multi_token(model, dropout, decoder, label_smoothing, gather)
    if isinstance(model, EncoderDecoder) or not model.config.experts:
        return language_modelling(model, dropout, decoder, label_smoothing, gather)

    def total(params, batch, key):
        params = decoder(params)
        inputs = batch.tokens, batch.positions, batch.segments
        hidden, routing = model.hidden_and_routing(params, *inputs, dropout, key)
        return cross_entropy(model, params, batch, hidden, label_smoothing, gather=gather), routing

    c = model.config
    return RoutedLanguageModelling(total, c.load_balancing_coef, c.router_z_coef)


def _multi_token(model: Any, dropout: float, decoder: Callable, smoothing: float, gather: bool) -> MultiTokenPrediction:
    def sums(params, batch, key):
        params = decoder(params)
        hidden = model.batch_hidden(params, batch, dropout, key)
        next_token = cross_entropy(model, params, batch, hidden, smoothing, gather=gather)
        return Sums(next_token, *head_sums(model, params, batch, hidden, gather=gather))

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
