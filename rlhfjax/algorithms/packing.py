"""Rollouts and rankings as packed rows: prompt and response joined, without the padding between sequences.

Rows are taken `part` at a time, [parts, part, width]; the first `used` parts hold all sequences. So what is computed
depends on how long the responses are, and the compiled program does not.

Responses to one prompt may share it. Their row holds it once, as a segment of its own up to its last token; each
response is a segment that goes on from there (`TokenBatch.prefixes`) and begins with the prompt's last token, so that
what predicts its first token is in its own segment, as everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhfjax.functional.packing import first_fit
from rlhfjax.types import Experience, RankedBatch, Rollout, TokenBatch, TokenExperience, TokenRanking

Place = Callable[[Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """Where J joined tokens of each of B sequences are in packed rows, of which none has more than `most` targets.

    `source` is the index of each packed token among the joined ones, -1 on padding; `place` is where each real token
    went, counted over all rows. `row` is that of each group of sequences with one prompt.
    """

    source: Int[Array, "N part W"]
    segments: Int[Array, "N part W"]
    prefixes: Int[Array, "N part W"] | None
    positions: Int[Array, "N part W"]
    place: Int[Array, "B J"]
    row: Int[Array, "G"]
    used: Int[Array, ""]
    most: int = field(metadata={"static": True})

    def tokens(self, rollout: Rollout) -> TokenBatch:
        """The joined sequences; response tokens are the targets."""
        joined = jnp.concatenate([rollout.prompt, rollout.response], axis=1)
        batch = self.batch(joined, self.responses(rollout.response_mask, False))
        return batch if rollout.routes is None else replace(batch, routes=self.taken(rollout.routes, -1))

    def batch(self, joined: Int[Array, "B J"], targets: Bool[Array, "N part W"]) -> TokenBatch:
        """The packed rows of these tokens."""
        tokens = self.taken(joined, 0)
        return TokenBatch(tokens, self.segments, self.positions, targets, self.prefixes, most=self.most)

    def responses(self, x: Array, padding: Any = 0) -> Array:
        """Values of response tokens, [B, R], at their places in the rows; `padding` elsewhere."""
        prompt = self.place.shape[1] - x.shape[1]
        return self.taken(jnp.pad(x, ((0, 0), (prompt, 0)), constant_values=padding), padding)

    def unpacked(self, x: Float[Array, "N part W"], mask: Bool[Array, "B R"]) -> Float[Array, "B R"]:
        """The other way: values at the response tokens, 0 on padding."""
        return jnp.where(mask, x.reshape(-1)[self.place[:, -mask.shape[1] :]], 0.0)

    def taken(self, joined: Shaped[Array, "B J *D"], padding: Any) -> Shaped[Array, "N part W *D"]:
        """Values of the joined tokens at their places in the rows; `padding` elsewhere."""
        flat = joined.reshape(-1, *joined.shape[2:])
        real = (self.source >= 0).reshape(self.source.shape + (1,) * (flat.ndim - 1))
        return jnp.where(real, flat[self.source], jnp.asarray(padding, joined.dtype))


def pack(rollout: Rollout, part: int, group: int = 1, multiple: int = 1) -> Packing:
    """A packing of these rollouts into rows of the longest possible sequence, `part` rows at a time.

    Each `group` rows next to each other are responses to one prompt, which they share. A row has no more response
    tokens than the longest possible responses of a group, so that models may read so many alone.
    """
    prompt, response = rollout.prompt.shape[1], rollout.response.shape[1]
    before = rollout.prompt_mask.sum(axis=1, dtype=jnp.int32)
    after = rollout.response_mask.sum(axis=1, dtype=jnp.int32)
    width = row_width(prompt, response, group, multiple)
    start = prompt - before  # prompts end where responses begin
    return _packed(start, before, after, after, prompt + response, part, width, group * response, group)


def row_width(prompt: int, response: int, group: int = 1, multiple: int = 1) -> int:
    """Tokens of a prompt and `group` responses to it in a row, up to the next `multiple`."""
    width = prompt + response if group == 1 else prompt - 1 + group * (response + 1)
    return -(-width // multiple) * multiple


def _packed(
    start: Int[Array, "B"],
    prompts: Int[Array, "B"],
    responses: Int[Array, "B"],
    targets: Int[Array, "B"],
    joined: int,
    part: int,
    width: int,
    most: int,
    group: int,
) -> Packing:
    """Sequences of `prompts` tokens from the column `start` on, and then `responses`; none at all is no sequence."""
    groups = len(prompts) // group
    parts = -(-groups // part)
    lengths = prompts + responses
    common = jnp.maximum(prompts - 1, 0) if group > 1 else jnp.zeros_like(prompts)
    own = (lengths - common).reshape(groups, group)
    before = common.reshape(groups, group).max(axis=1, keepdims=True) + jnp.cumsum(own, axis=1) - own
    total, counted = before[:, -1] + own[:, -1], targets.reshape(groups, group).sum(axis=1, dtype=jnp.int32)
    places = first_fit(total, width, parts * part, counted, most)

    column = jnp.arange(joined, dtype=jnp.int32)[None, :]
    position = column - start[:, None]
    real = (position >= 0) & (position < lengths[:, None])
    shared = position < common[:, None]
    base = jnp.repeat(places.row * width + places.offset, group)[:, None]
    place = base + jnp.where(shared, position, before.reshape(-1, 1) + position - common[:, None])
    nowhere = jnp.where(real, place, parts * part * width).reshape(-1)  # one prompt of the group covers the others

    def scattered(values, start):
        flat = jnp.full(parts * part * width, start, jnp.int32)
        values = jnp.broadcast_to(values, real.shape).reshape(-1)
        return flat.at[nowhere].set(values, mode="drop").reshape(parts, part, width)

    prefix, segment = _numbers(places.number, group)
    return Packing(
        scattered(jnp.arange(len(prompts), dtype=jnp.int32)[:, None] * joined + column, -1),
        scattered(jnp.where(shared, prefix, segment), 0),
        scattered(prefix, 0) if group > 1 else None,
        scattered(position, 0),
        jnp.where(real, place, 0),
        places.row,
        -(-places.used // part),
        most,
    )


def _numbers(number: Int[Array, "G"], group: int) -> tuple[Int[Array, "B 1"], Int[Array, "B 1"]]:
    """Segments of each sequence, in the group of that number in its row: the shared prompt's, and its own."""
    if group == 1:
        return number[:, None], number[:, None]
    prefix = (number[:, None] - 1) * (group + 1) + 1
    own = prefix + 1 + jnp.arange(group, dtype=jnp.int32)[None, :]
    return jnp.repeat(prefix, group, axis=0), own.reshape(-1, 1)


def packed_experience(
    part: int, experience: Experience, place: Place = lambda tree: tree, group: int = 1, multiple: int = 1
) -> tuple[TokenExperience, Int[Array, ""]]:
    """Experience by token, [parts, part, width], and how many of the parts hold any; `place` lays them on devices."""
    rollout, packing = experience.rollout, pack(experience.rollout, part, group, multiple)
    each = (rollout.log_probs, rollout.ref_log_probs, rollout.values, experience.advantages, experience.returns)
    return place(TokenExperience(packing.tokens(rollout), *map(packing.responses, each))), packing.used


def packed_ranking(
    part: int, width: int, batch: RankedBatch, place: Place = lambda tree: tree, ends: bool = False
) -> tuple[TokenRanking, Int[Array, ""]]:
    """Comparisons by token, [parts, part, width], and how many of the parts hold any; each prompt is there once.

    No comparison is longer than `width` and none is in two parts. The response's tokens are the targets; with `ends`
    its last one alone is. `place` lays the rows on devices.
    """
    candidates, joined = batch.tokens.shape[1:]
    present = batch.mask.reshape(-1)
    prompts = jnp.where(present, jnp.repeat(batch.prompt_lengths, candidates), 0)
    lengths = jnp.where(present, batch.token_mask.sum(axis=2, dtype=jnp.int32).reshape(-1), 0)
    targets = present.astype(jnp.int32) if ends else lengths - prompts
    most = min(width, 2 * candidates) if ends else width
    packing = _packed(
        jnp.zeros_like(prompts), prompts, lengths - prompts, targets, joined, part, width, most, candidates
    )
    column = jnp.arange(joined, dtype=jnp.int32)[None, :]
    target = (column >= (lengths - 1 if ends else prompts)[:, None]) & (column < lengths[:, None])
    rows = packing.batch(batch.tokens.reshape(-1, joined), packing.taken(target, False))
    rows, of = place((rows, jnp.maximum(packing.source, 0) // joined))
    parts = jnp.arange(len(rows.tokens), dtype=jnp.int32)
    here = (packing.row // part)[None, :] == parts[:, None]
    mask = batch.mask[None] & here[:, :, None]
    return TokenRanking(rows, of, jnp.broadcast_to(batch.ranks[None], mask.shape), mask), packing.used


def on_packed(
    part: int,
    rollout: Rollout,
    function: Callable[[TokenBatch], Any],
    place: Place = lambda tree: tree,
    group: int = 1,
    multiple: int = 1,
) -> Any:
    """`function` of the packed rows, [part, width] to a tree of [part, width], at the response tokens, [B, R]."""
    packing = pack(rollout, part, group, multiple)
    function = jax.jit(function, inline=True)  # traced once, not for its shapes as well
    batch = place(packing.tokens(rollout))
    one = jax.tree.map(lambda x: x[0], batch)
    outs = jax.tree.map(lambda s: jnp.zeros((len(batch.tokens), *s.shape), s.dtype), jax.eval_shape(function, one))

    def body(i, outs):
        made = function(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch))
        return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), outs, made)

    outs = jax.lax.fori_loop(0, packing.used, body, outs)
    return jax.tree.map(lambda x: packing.unpacked(x, rollout.response_mask), outs)
