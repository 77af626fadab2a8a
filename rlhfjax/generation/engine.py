"""Sampling with a cache: prefill once, then one token per row until every row has ended.

A row's randomness depends on its own uid and position alone, so a prompt's sample does not depend on its neighbours.
"""

import jax
import jax.numpy as jnp

from rlhfjax import layout
from rlhfjax.generation.routes import routes_of, with_routes
from rlhfjax.generation.sampling import Sampler, SamplingParams, draw, stops, uniforms
from rlhfjax.generation.slots import each_sample, rollout
from rlhfjax.generation.speculative import speculate
from rlhfjax.types import Params, PromptBatch, Rollout


def generate(
    model: Sampler,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: SamplingParams,
    samples: int = 1,
) -> Rollout:
    """Responses to a batch of prompts, [B, max_new_tokens] tokens, padded after the end.

    With `samples` n each prompt has n rows, as `rollout` has them. Draft tokens (`sampling.speculation`) and continuous
    batching (`sampling.slots`) change how long it takes, not what is drawn.
    """
    batch, length = len(prompts.tokens) * samples, sampling.max_new_tokens
    if sampling.speculation and samples == 1:
        return speculate(model, params, prompts, key, sampling, sampling.speculation)
    # On several devices rows that all decode at once stay where their prompts are; to take one would gather them.
    at_once = (sampling.slots or batch) >= batch and (samples == 1 or layout.current() is not None)
    if sampling.speculation or sampling.top_log_probs or not at_once:
        return rollout(model, params, prompts, key, sampling, sampling.slots, samples)
    prompts = jax.tree.map(lambda x: layout.lay("rows", x) if x.ndim == 1 else layout.lay("ids", x), prompts)
    params = model.arrange(params, batch)
    logits, cache = model.prefill(params, prompts.tokens, prompts.mask, length)
    if samples > 1:
        prompts, cache = each_sample(prompts, samples), cache.repeat(samples)
        logits = jnp.repeat(logits, samples, axis=0)
    noise = uniforms(key, prompts.uid, length)

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
    _, _, cache, done, tokens, log_probs, mask = jax.lax.while_loop(unfinished, step, start)
    return with_routes(Rollout(prompts.tokens, prompts.mask, tokens, mask, done, log_probs), routes_of(cache))
