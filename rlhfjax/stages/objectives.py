"""Objectives over models: what the stages train policies and reward models on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import (
    Dpo,
    Grpo,
    LanguageModelling,
    Mix,
    OnlineAlgorithm,
    Ppo,
    RewardModelling,
    Rloo,
    RoutedLanguageModelling,
)
from rlhfjax.algorithms.likelihood import (
    cross_entropy,
    log_probs_and_values,
    token_log_probs,
    token_scores,
    token_values,
)
from rlhfjax.algorithms.multi_token import MultiTokenPrediction, Sums, head_sums
from rlhfjax.config import schema
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.types import Params, RankedBatch, TokenBatch, TokenRanking


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


def preference_optimisation(model: SequenceModel, loss: schema.PreferenceLoss, gather: bool = True) -> Dpo:
    """DPO of a model; its parameters have those of the reference beside them, under `reference`.

    Dropout is off: the ratio to the reference would be noise. `gather` is for one device.
    """

    def log_probs(params: Params, batch: RankedBatch | TokenRanking) -> jax.Array:
        if isinstance(batch, TokenRanking):
            return batch.of_candidates(token_log_probs(model, params, batch.batch, gather=gather)[0])
        each, _ = token_log_probs(model, params, joined_rows(batch), gather=gather)
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


def ppo_objective(c: schema.Ppo, policy: SequenceModel, value: SequenceModel, gather: bool = True) -> Ppo | Mix:
    """PPO over the two models, with the pretraining loss in the same gradient where the recipe has it.

    `gather` is for one device (see `rlhfjax.functional.vocabulary`).
    """
    how = {"entropy_gradient": c.loss.entropy_coef > 0, "gather": gather}

    def both(params: Params, rows: TokenBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        parts = params["policy"], params["value"]["head"], rows
        return log_probs_and_values(policy, *parts, c.sampling.temperature, **how)

    algorithm = Ppo(
        log_probs=policy_log_probs(policy, c.sampling.temperature, **how),
        values=lambda params, rows: token_values(value, params["value"], rows),
        both=both if c.value.trunk == "policy" else None,
        clip=c.loss.clip,
        value_clip=c.value.clip,
        value_coef=c.value.coef,
        entropy_coef=c.loss.entropy_coef,
        **c.returns.model_dump(),
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    return with_pretraining(algorithm, c.ptx, policy, gather)


def policy_log_probs(policy: SequenceModel, temperature: float, **how: bool) -> Callable[[Params, TokenBatch], Any]:
    """Log-probabilities and entropies of a policy at the temperature of sampling, as online algorithms read them."""
    return lambda params, rows: token_log_probs(policy, params["policy"], rows, temperature, **how)


def with_pretraining(
    algorithm: OnlineAlgorithm, ptx: schema.Ptx | None, policy: SequenceModel, gather: bool = True
) -> Any:
    """An online algorithm, with the loss of pretraining in the same gradient where the recipe has it (PPO-ptx)."""
    if ptx is None:
        return algorithm
    second = training_loss(policy, decoder=_policy, gather=gather)
    return Mix(algorithm, ptx.coef, second, shared=_policy)


def _policy(params: Params) -> Params:
    return params["policy"]


def grpo_objective(c: schema.Grpo, policy: SequenceModel, gather: bool = True) -> Any:
    """GRPO over the policy, with the pretraining loss in the same gradient where the recipe has it."""
    algorithm = Grpo(
        log_probs=policy_log_probs(policy, c.sampling.temperature, gather=gather),
        group=c.groups.size,
        clip=c.loss.clip,
        clip_high=c.loss.clip_high,
        beta=c.kl.in_loss,
        deviation=c.groups.deviation,
        average=c.loss.average,
        longest=c.sampling.max_new_tokens,
        overlong=c.groups.overlong,
        dynamic_sampling=c.groups.draws > 1,
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    return with_pretraining(algorithm, c.ptx, policy, gather)


def rloo_objective(c: schema.Rloo, policy: SequenceModel, gather: bool = True) -> Any:
    """RLOO over the policy, with the pretraining loss in the same gradient where the recipe has it."""
    algorithm = Rloo(
        log_probs=policy_log_probs(policy, c.sampling.temperature, gather=gather),
        group=c.groups.size,
        clip=c.loss.clip,
        ratio=c.loss.ratio,
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    return with_pretraining(algorithm, c.ptx, policy, gather)
