"""A model's compiled programs for those who hold lists of ids: whole responses at once, or a token at a time."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhfjax.generation.sampling import RowSampling, Sampler, SamplingParams, by_row, uniforms
from rlhfjax.generation.session import Slots, Step, admit, empty_slots, step
from rlhfjax.generation.slots import rollout
from rlhfjax.target import current
from rlhfjax.types import Params, PromptBatch, Rollout

_STOPS = 8  # stop ids that a program has room for before it needs another


@dataclass(frozen=True)
class Room:
    """What fits into a session: `slots` responses at a time, `prompt` and `new_tokens` tokens of each.

    Both together may be `context` tokens where one cache holds them (None: as many as they are). Each response may have
    `stops` stop ids, `biases` logits that something is added to, and `top_log_probs` likeliest tokens reported of each
    position. With a `chunk`, prompts are read so many tokens at a time, and what they begin with alike is read once.
    """

    slots: int
    prompt: int
    new_tokens: int
    context: int | None = None
    stops: int = _STOPS
    top_log_probs: int = 0
    biases: int = 0
    chunk: int | None = None

    @property
    def together(self) -> int:
        """Tokens of a prompt and its response."""
        return self.context or self.prompt + self.new_tokens


class Programs:
    """A model with weights that stay arranged. Rows, widths and lengths are padded to powers of two, one program each.

    Padding is never sampled, and other settings are no other program: the number of prompts and how to draw are
    arguments. Only draft tokens (`SamplingParams.speculation`) are compiled in. `laid_out` is put around
    what is traced.
    """

    def __init__(
        self,
        model: Sampler,
        params: Params,
        slots: int = 64,
        narrowest: int = 16,
        laid_out: Callable[[Callable], Callable] = lambda program: program,
    ):
        self._arrange = jax.jit(laid_out(model.arrange), static_argnums=1)
        self._params, self._weights = params, {}
        reading: Any = model  # where prompts are read in chunks it has `extend`, as decoders have it
        self.slots, self.narrowest = slots, narrowest

        def run(weights, prompts, key, asked, rows, shape: SamplingParams, samples: int) -> Rollout:
            return rollout(model, weights, prompts, key, shape, shape.slots or self.slots, samples, asked, rows)

        def opened(room: Room) -> Slots:
            sizes = (room.prompt, room.new_tokens) if room.context is None else (room.context, 0)
            nobody = SamplingParams(1, 0, 0, top_log_probs=room.top_log_probs)
            rows = by_row([nobody] * room.slots, room.stops, room.top_log_probs, room.biases)
            noise = jnp.zeros((room.slots, room.new_tokens, 2), jnp.float32)
            return empty_slots(model.empty_cache(room.slots, *sizes), noise, jax.tree.map(jnp.asarray, rows))

        def admitted(weights, slots: Slots, place, prompts: PromptBatch, key, rows: RowSampling) -> tuple[Slots, Step]:
            logits, read = model.prefill(weights, prompts.tokens, prompts.mask, 0)
            noise = uniforms(key, prompts.uid, slots.noise.shape[1])
            return admit(slots, place, read, logits, noise, rows)

        def read(weights, slots: Slots, place, source, start, tokens, count) -> tuple[Slots, Array]:
            """`count` tokens more of a prompt, of which the slot `source` holds the first `start`."""
            row = replace(slots.cache.take(source), lengths=start)
            hidden, row = reading.extend(weights, row, tokens, count)
            return replace(slots, cache=slots.cache.put(row, place)), hidden[0]

        def begun(weights, slots: Slots, place, hidden, last, uid, key, rows: RowSampling) -> tuple[Slots, Step]:
            """The first token after a prompt that its slot holds, from the states of its last chunk."""
            logits = reading.unembed(weights, hidden[last])
            noise = uniforms(key, uid, slots.noise.shape[1])
            return admit(slots, place, None, logits, noise, rows)

        def stepped(weights, slots: Slots, kept, count: int) -> tuple[Slots, Step]:
            slots = replace(slots, active=slots.active & kept)
            return jax.lax.scan(lambda slots, _: step(model, weights, slots), slots, length=count)

        self.run = jax.jit(laid_out(run), static_argnames=("shape", "samples"))
        self.open = jax.jit(laid_out(opened), static_argnums=0)
        # A session's cache is written in place; what went in is gone.
        self.admit = jax.jit(laid_out(admitted), donate_argnums=1)
        self.read = jax.jit(laid_out(read), donate_argnums=1)
        self.begin = jax.jit(laid_out(begun), donate_argnums=1)
        self.step = jax.jit(laid_out(stepped), static_argnames="count", donate_argnums=1)

    def over(self, params: Params) -> "Programs":
        """The same programs, compiled as far as they are, with other parameters of the same shapes."""
        made = copy.copy(self)
        made._params, made._weights = params, {}
        return made

    def weights(self, rows: int) -> Any:
        """The weights as so many rows read them on the target."""
        alone, target = rows == 1, current()
        if (alone, target) not in self._weights:
            self._weights = {(alone, target): self._arrange(self._params, 1 if alone else None)}  # one copy at a time
        return self._weights[alone, target]

    def room(self, responses: int, prompt: int, sampling: SamplingParams) -> Room:
        """Room for so many responses to prompts of up to `prompt` tokens, shared with others of about this size."""
        prompt, new = (max(self.narrowest, power_of_two(size)) for size in (prompt, sampling.max_new_tokens))
        slots = min(self.slots, power_of_two(responses))
        return Room(slots, prompt, new, None, stops_of(sampling), sampling.top_log_probs)

    def generate(
        self, prompts: Sequence[Sequence[int]], key: jax.Array, sampling: SamplingParams, samples: int = 1
    ) -> Rollout:
        """`samples` responses to each prompt, in numpy; sample j of prompt i has the uid i · samples + j."""
        rows, width = power_of_two(len(prompts)), power_of_two(max(map(len, prompts)))
        batch = padded(prompts, rows, max(self.narrowest, width), sampling.pad_id)
        shape, settings = sampling, None
        if not sampling.speculation:
            length = max(self.narrowest, power_of_two(sampling.max_new_tokens))
            shape = SamplingParams(
                length, 0, sampling.pad_id, slots=sampling.slots, top_log_probs=sampling.top_log_probs
            )
            settings = by_row([sampling] * rows, stops_of(sampling), sampling.top_log_probs)
        made = self.run(
            self.weights(rows * samples), batch, key, jnp.int32(len(prompts)), settings, shape=shape, samples=samples
        )
        return _cut(made, len(prompts) * samples, sampling.max_new_tokens)


def _cut(made: Rollout, rows: int, length: int) -> Rollout:
    """The first rows of a rollout, of at most so many tokens each, in numpy."""
    made = jax.tree.map(lambda x: np.asarray(x)[:rows], made)
    responses = ("response", "response_mask", "sampled_log_probs", "top_ids", "top_log_probs")
    shorter = {name: x[:, :length] for name in responses if (x := getattr(made, name)) is not None}
    return replace(made, **shorter)


def padded(prompts: Sequence[Sequence[int]], rows: int, width: int, pad_id: int) -> PromptBatch:
    """Prompts as a batch of so many rows and columns, numbered from 0."""
    tokens, mask = np.full((rows, width), pad_id, np.int32), np.zeros((rows, width), bool)
    mask[len(prompts) :, -1] = True  # a row of padding is a prompt of one token that nobody asks
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(rows, dtype=jnp.int32))


def stops_of(sampling: SamplingParams) -> int:
    """Room for the stop ids of these settings."""
    return max(_STOPS, power_of_two(1 + len(sampling.stop_ids)))


def power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()
