"""Sampling with a cache: prefill once, then one token per row until every row has ended.

A row's randomness depends on its own uid and position alone, so a prompt's sample does not depend on its neighbours.
"""

import jax
import jax.numpy as jnp

from rlhfjax.generation.sampling import Sampler, SamplingParams, draw, stops, uniforms
from rlhfjax.generation.slots import rollout
from rlhfjax.generation.speculative import speculate
from rlhfjax.types import Params, PromptBatch, Rollout


def generate(model: Sampler, params: Params, prompts: PromptBatch, key: jax.Array, sampling: SamplingParams) -> Rollout:
    """Responses to a batch of prompts, [B, max_new_tokens] tokens, padded after the end.

    Draft tokens (`sampling.speculation`) and continuous batching (`sampling.slots`) change how long it takes, not what
    is drawn.
    """
    if sampling.speculation:
        return speculate(model, params, prompts, key, sampling, sampling.speculation)
    if sampling.top_log_probs or (sampling.slots or len(prompts.tokens)) < len(prompts.tokens):
        return rollout(model, params, prompts, key, sampling, sampling.slots)
    params = model.arrange(params, len(prompts.tokens))
    batch, length = prompts.tokens.shape[0], sampling.max_new_tokens
    noise = uniforms(key, prompts.uid, length)
    logits, cache = model.prefill(params, prompts.tokens, prompts.mask, length)

    def step(carry):
        t, logits, cache, done, tokens, log_probs, mask = carry
        drawn = draw(jax.lax.dynamic_index_in_dim(noise, t, axis=1, keepdims=False), logits, sampling)
        token = jnp.where(done, sampling.pad_id, drawn.token)
        tokens = tokens.at[:, t].set(token)
        log_probs = log_probs.at[:, t].set(jnp.where(done, 0.0, drawn.log_prob))
        mask = mask.at[:, t].set(~done)
        done = done | stops(token, t, sampling)
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
