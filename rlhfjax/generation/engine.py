"""Sampling with a cache: prefill once, then one token a row until every row has ended.

A row's randomness depends on its own uid and position alone, so a prompt's sample does not depend on its neighbours.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.functional.likelihood import token_log_probs
from rlhfjax.functional.logits import filter_logits
from rlhfjax.types import Params, PromptBatch, Rollout


class Sampler(Protocol):
    """What can be sampled from: a decoder, or anything else with these two functions."""

    def prefill(self, params: Params, prompt: Array, prompt_mask: Array, new_tokens: int) -> tuple[Array, Any]: ...

    def decode(self, params: Params, cache: Any, tokens: Array) -> tuple[Array, Any]: ...


@dataclass(frozen=True)
class SamplingParams:
    """How to draw; `temperature` 0 is greedy, top_k 0 and top_p 1 are off.

    `stop_id` ends a response from position `stop_after` on, `pad_id` fills what follows.
    """

    max_new_tokens: int
    stop_id: int
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_after: int = 0


def draw(
    keys: jax.Array, logits: Float[Array, "B V"], sampling: SamplingParams
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw one token a row; the log-probability is that of the unfiltered policy at the same temperature."""
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, token_log_probs(logits, token)
    filtered = filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    token = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
    return token, token_log_probs(logits, token, sampling.temperature)


def generate(model: Sampler, params: Params, prompts: PromptBatch, key: jax.Array, sampling: SamplingParams) -> Rollout:
    """Responses to a batch of prompts, [B, max_new_tokens] tokens, padded after the end."""
    rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, prompts.uid)
    batch, length = prompts.tokens.shape[0], sampling.max_new_tokens
    logits, cache = model.prefill(params, prompts.tokens, prompts.mask, length)

    def step(carry):
        t, logits, cache, done, tokens, log_probs, mask = carry
        token, log_prob = draw(jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows, t), logits, sampling)
        token = jnp.where(done, sampling.pad_id, token)
        tokens = tokens.at[:, t].set(token)
        log_probs = log_probs.at[:, t].set(jnp.where(done, 0.0, log_prob))
        mask = mask.at[:, t].set(~done)
        done = done | ((token == sampling.stop_id) & (t >= sampling.stop_after))
        logits, cache = model.decode(params, cache, token)
        return t + 1, logits, cache, done, tokens, log_probs, mask

    def unfinished(carry):
        t, _, _, done, *_ = carry
        return (t < length) & ~jnp.all(done)

    start = (
        jnp.int32(0),
        logits,
        cache,
        jnp.zeros((batch,), bool),
        jnp.full((batch, length), sampling.pad_id, jnp.int32),
        jnp.zeros((batch, length), jnp.float32),
        jnp.zeros((batch, length), bool),
    )
    _, _, _, done, tokens, log_probs, mask = jax.lax.while_loop(unfinished, step, start)
    return Rollout(prompts.tokens, prompts.mask, tokens, mask, done, log_probs)
