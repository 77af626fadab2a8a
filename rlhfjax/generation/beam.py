"""Beam search: the best response that a search of fixed width finds, compiled, on any model with a cache.

What competes is what sampling could draw: responses with a stop token, and those cut off at `max_new_tokens`. Every
open beam is offered its end at every step, so a good ending is not lost to beams that go on.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.masking import Scalar
from rlhfjax.generation.sampling import Sampler
from rlhfjax.types import Params, PromptBatch, Rollout


@dataclass(frozen=True)
class BeamParams:
    """How to search; `stop_id` and each of `stop_ids` end a response, `pad_id` fills what follows."""

    max_new_tokens: int
    stop_id: int
    pad_id: int
    beams: int = 4
    length_penalty: float = 0.6
    stop_ids: tuple[int, ...] = ()

    @property
    def ends(self) -> Int[Array, "E"]:
        return jnp.asarray((self.stop_id, *self.stop_ids), jnp.int32)


class _Beams(NamedTuple):
    """K sequences for each of B prompts: tokens, their log-probabilities, and what they are ordered by."""

    tokens: Int[Array, "B K T"]
    log_probs: Float[Array, "B K T"]
    score: Float[Array, "B K"]


def length_normalizer(length: Scalar, alpha: float) -> Float[Array, ""]:
    """lp(Y) = ((5 + |Y|) / 6)^α, |Y| with the stop token (Wu et al. 2016, eq. 14); α 0 is 1 for every length."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def beam_search(model: Sampler, params: Params, prompts: PromptBatch, search: BeamParams) -> Rollout:
    """The response to each prompt with the highest Σ log p / lp(Y) that `beams` open sequences lead to.

    The search goes on while an open beam can win: log-probabilities only fall, so what a beam can still reach is at
    most its own over lp(max_new_tokens). A response does not depend on the neighbours of its prompt in the batch. The
    cache of the model has a method `take`.
    """
    batch, length, beams = prompts.tokens.shape[0], search.max_new_tokens, search.beams
    params = model.arrange(params)
    logits, cache = model.prefill(params, prompts.tokens, prompts.mask, length)
    logits, cache = jnp.repeat(logits, beams, axis=0), cache.take(jnp.repeat(jnp.arange(batch), beams))
    tokens = jnp.full((batch, beams, length), search.pad_id, jnp.int32)
    # The beams of a prompt are still the same: all but the first are closed.
    score = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (batch, beams))
    opened = _Beams(tokens, jnp.zeros(tokens.shape), score)
    ended = _Beams(tokens[:, :1], jnp.zeros((batch, 1, length)), jnp.full((batch, 1), -jnp.inf))

    def step(carry: tuple) -> tuple:
        t, logits, cache, opened, ended = carry
        log_p = jax.nn.log_softmax(logits.reshape(batch, beams, -1), axis=-1)
        ended = _best(ended, _ends(opened, log_p, t, search))
        opened, parent = _continued(opened, log_p, t, search)
        rows = jnp.arange(batch)[:, None] * beams + parent
        logits, cache = model.decode(params, cache.take(rows.ravel()), opened.tokens[:, :, t].ravel())
        return t + 1, logits, cache, opened, ended

    def can_win(carry: tuple) -> Bool[Array, ""]:
        t, _, _, opened, ended = carry
        return (t < length) & jnp.any(_cut_off(opened, search).score.max(axis=1) > ended.score[:, 0])

    *_, opened, ended = jax.lax.while_loop(can_win, step, (jnp.int32(0), logits, cache, opened, ended))
    return _rollout(prompts, _best(ended, _cut_off(opened, search)), search)


def _ends(opened: _Beams, log_p: Float[Array, "B K V"], t: Array, search: BeamParams) -> _Beams:
    """Every open beam with its likeliest stop token at slot t; any other would end it at the same length, for less."""
    stops = log_p[:, :, search.ends]
    stop, token = stops.max(axis=-1), search.ends[stops.argmax(axis=-1)]
    score = (opened.score + stop) / length_normalizer(t + 1, search.length_penalty)
    return _Beams(opened.tokens.at[:, :, t].set(token), opened.log_probs.at[:, :, t].set(stop), score)


def _cut_off(opened: _Beams, search: BeamParams) -> _Beams:
    """Open beams as they would count at the last slot if no further token cost anything."""
    return opened._replace(score=opened.score / length_normalizer(search.max_new_tokens, search.length_penalty))


def _continued(opened: _Beams, log_p: Float[Array, "B K V"], t: Array, search: BeamParams) -> tuple[_Beams, Array]:
    """The K likeliest continuations without a stop token, and the beam that each goes on from."""
    batch, beams, vocabulary = log_p.shape
    going_on = log_p.at[:, :, search.ends].set(-jnp.inf)
    score, place = jax.lax.top_k((opened.score[:, :, None] + going_on).reshape(batch, -1), beams)
    parent, token = place // vocabulary, place % vocabulary
    kept = _take(opened, parent)
    log_prob = jnp.take_along_axis(log_p.reshape(batch, -1), place, axis=1)
    return _Beams(kept.tokens.at[:, :, t].set(token), kept.log_probs.at[:, :, t].set(log_prob), score), parent


def _best(first: _Beams, second: _Beams) -> _Beams:
    """The one of the highest score among both; of equal scores the earlier stays."""
    both = jax.tree.map(lambda *sides: jnp.concatenate(sides, axis=1), first, second)
    return _take(both, jnp.argmax(both.score, axis=1, keepdims=True))


def _take(beams: Any, chosen: Int[Array, "B N"]) -> Any:
    return jax.tree.map(lambda x: jax.vmap(lambda row, places: row[places])(x, chosen), beams)


def _rollout(prompts: PromptBatch, best: _Beams, search: BeamParams) -> Rollout:
    tokens, log_probs = best.tokens[:, 0], best.log_probs[:, 0]
    stops = jnp.isin(tokens, search.ends).astype(jnp.int32)
    mask = jnp.cumsum(stops, axis=1) == stops  # up to the first stop token, of which there is at most one
    tokens, log_probs = jnp.where(mask, tokens, search.pad_id), jnp.where(mask, log_probs, 0.0)
    return Rollout(prompts.tokens, prompts.mask, tokens, mask, (stops > 0).any(axis=1), log_probs)
