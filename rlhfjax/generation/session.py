"""Sampling as a session: slots in which responses are written, `admit` to put prompts into them, `step` to go on.

Both are pure functions of fixed shapes, so they compile once for any prompts, any moment and, with `RowSampling`, any
settings. A compiled loop over them is `rollout`; a host that calls them one at a time can give out each token as it
comes, and drop or add a response in between (`serving.Engine`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.generation.sampling import Drawn, Sampler, Sampling, draw, stops


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """S places, each with a response under way or free: all that `admit` and `step` go on from.

    What a slot draws depends on its own row of these arrays alone: not on the others, nor on when it was admitted.
    """

    cache: Any  # what the model keeps of each slot's prompt and of its tokens up to the last but one
    token: Int[Array, "S"]  # the token drawn last, which the next step reads
    position: Int[Array, "S"]  # how many tokens were drawn: the next one's place in its response
    active: Bool[Array, "S"]  # whether a response is being written; all other slots are free
    noise: Float[Array, "S R 2"]  # two numbers for each position of the response (`sampling.uniforms`)
    sampling: Sampling  # how to draw: for each slot, or one static setting for all


class Step(NamedTuple):
    """One more token of each row: what was drawn, which rows had a response to write it to, and which it ended.

    A row that wrote and is not active afterwards has its last token; if none `stopped` it, it reached its length.
    """

    drawn: Drawn
    written: Bool[Array, "S"]
    stopped: Bool[Array, "S"]


def empty_slots(cache: Any, noise: Float[Array, "S R 2"], sampling: Sampling) -> Slots:
    """Free slots around an empty cache; of `noise` and `sampling` the shapes count."""
    nothing = jnp.zeros(len(noise), jnp.int32)
    return Slots(cache, nothing, nothing, jnp.zeros(len(noise), bool), noise, sampling)


def admit(
    slots: Slots,
    place: Int[Array, "N"],
    read: Any,
    logits: Float[Array, "N V"],
    noise: Float[Array, "N R 2"],
    sampling: Sampling,
) -> tuple[Slots, Step]:
    """Put N prompts into the slots `place`, which are distinct, and draw the first token of each response.

    `read` is the model's cache of the prompts (None: the slots hold them) and `logits` what it says after them. A place
    of S or more is nowhere: nothing is kept of its prompt. What was in a slot is gone.
    """
    first, kept = jnp.zeros_like(place), place < len(slots.token)
    drawn = draw(noise[:, 0], logits, sampling)
    stopped, active = _ends(drawn, first, kept, sampling)

    def put(mine: Array, theirs: Array) -> Array:
        return mine.at[place].set(theirs, mode="drop", unique_indices=True)

    made = Slots(
        slots.cache if read is None else slots.cache.put(read, place),
        put(slots.token, drawn.token),
        put(slots.position, first + 1),
        put(slots.active, active),
        put(slots.noise, noise),
        jax.tree.map(put, slots.sampling, sampling),
    )
    return made, Step(drawn, kept, stopped)


def step(model: Sampler, params: Any, slots: Slots) -> tuple[Slots, Step]:
    """One token more in every active slot. Free slots are computed too, and what they draw means nothing."""
    logits, cache = model.decode(params, slots.cache, slots.token)
    noise = jnp.take_along_axis(slots.noise, slots.position[:, None, None], axis=1, mode="clip")[:, 0]
    drawn = draw(noise, logits, slots.sampling)
    stopped, active = _ends(drawn, slots.position, slots.active, slots.sampling)
    made = Slots(cache, drawn.token, slots.position + 1, active, slots.noise, slots.sampling)
    return made, Step(drawn, slots.active, stopped)


def _ends(drawn: Drawn, position: Array, written: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Which rows a stop token ended, and which go on."""
    stopped = written & stops(drawn.token, position, sampling)
    return stopped, written & ~stopped & (position + 1 < sampling.max_new_tokens)
