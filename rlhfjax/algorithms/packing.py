"""Rollouts as packed rows: prompt and response joined, without the padding between sequences.

Rows are taken `part` at a time, [parts, part, width]; the first `used` parts hold all sequences. So what is computed
depends on how long the responses are, and the compiled program does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.packing import first_fit
from rlhfjax.types import Experience, Rollout, TokenBatch, TokenExperience

Place = Callable[[Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Where the tokens of a rollout are in packed rows.

    `source` is the index of each packed token among the joined ones, -1 on padding; `place` is where each response
    token went, counted over all rows.
    """

    source: Int[Array, "N part W"]
    segments: Int[Array, "N part W"]
    positions: Int[Array, "N part W"]
    place: Int[Array, "B R"]
    used: Int[Array, ""]

    def tokens(self, rollout: Rollout) -> TokenBatch:
        """The joined sequences; response tokens are the targets."""
        tokens = self._take(jnp.concatenate([rollout.prompt, rollout.response], axis=1), 0)
        targets = self.responses(rollout.response_mask, False)
        return TokenBatch(tokens, self.segments, self.positions, targets, most=rollout.response.shape[1])

    def responses(self, x: Array, padding: Any = 0) -> Array:
        """Values of response tokens, [B, R], at their places in the rows; `padding` elsewhere."""
        prompt = self.source_width - x.shape[1]
        return self._take(jnp.pad(x, ((0, 0), (prompt, 0)), constant_values=padding), padding)

    def unpacked(self, x: Float[Array, "N part W"], mask: Bool[Array, "B R"]) -> Float[Array, "B R"]:
        """The other way: values at the response tokens, 0 on padding."""
        return jnp.where(mask, x.reshape(-1)[self.place], 0.0)

    @property
    def source_width(self) -> int:
        """Prompt and response together; no row is longer, or shorter."""
        return self.source.shape[2]

    def _take(self, joined: Array, padding: Any) -> Array:
        return jnp.where(self.source >= 0, joined.reshape(-1)[self.source], jnp.asarray(padding, joined.dtype))


def pack(rollout: Rollout, part: int) -> Packing:
    """A packing of these rollouts into rows of the longest possible sequence, `part` rows at a time.

    A row has no more response tokens than the longest possible response, so that models may read so many alone.
    """
    batch, prompt = rollout.prompt.shape
    width = prompt + rollout.response.shape[1]
    parts = -(-batch // part)
    before = rollout.prompt_mask.sum(axis=1, dtype=jnp.int32)
    responses = rollout.response_mask.sum(axis=1, dtype=jnp.int32)
    lengths = before + responses
    places = first_fit(lengths, width, parts * part, responses, width - prompt)

    slots = jnp.arange(width, dtype=jnp.int32)[None, :]
    position = slots - (prompt - before)[:, None]  # prompts end where responses begin
    real = (position >= 0) & (position < lengths[:, None])
    target = (places.row * width + places.offset)[:, None] + position
    nowhere = jnp.where(real, target, parts * part * width)

    def scattered(values, start):
        flat = jnp.full(parts * part * width, start, jnp.int32)
        values = jnp.broadcast_to(values, nowhere.shape).reshape(-1)
        return flat.at[nowhere.reshape(-1)].set(values, mode="drop").reshape(parts, part, width)

    source = jnp.arange(batch, dtype=jnp.int32)[:, None] * width + slots
    return Packing(
        scattered(source, -1),
        scattered(places.number[:, None], 0),
        scattered(position, 0),
        jnp.where(real, target, 0)[:, prompt:],
        -(-places.used // part),
    )


def packed_experience(
    part: int, experience: Experience, place: Place = lambda tree: tree
) -> tuple[TokenExperience, Int[Array, ""]]:
    """Experience by token, [parts, part, width], and how many of the parts hold any; `place` lays them on devices."""
    rollout, packing = experience.rollout, pack(experience.rollout, part)
    each = (rollout.log_probs, rollout.ref_log_probs, rollout.values, experience.advantages, experience.returns)
    return place(TokenExperience(packing.tokens(rollout), *map(packing.responses, each))), packing.used


def on_packed(
    part: int, rollout: Rollout, function: Callable[[TokenBatch], Any], place: Place = lambda tree: tree
) -> Any:
    """`function` of the packed rows, [part, width] to a tree of [part, width], at the response tokens, [B, R]."""
    packing, function = pack(rollout, part), jax.jit(function, inline=True)  # traced once, not for its shapes as well
    batch = place(packing.tokens(rollout))
    one = jax.tree.map(lambda x: x[0], batch)
    outs = jax.tree.map(lambda s: jnp.zeros((len(batch.tokens), *s.shape), s.dtype), jax.eval_shape(function, one))

    def body(i, outs):
        made = function(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch))
        return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), outs, made)

    outs = jax.lax.fori_loop(0, packing.used, body, outs)
    return jax.tree.map(lambda x: packing.unpacked(x, rollout.response_mask), outs)
