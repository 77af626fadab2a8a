"""Responses that come a token at a time: prompts are submitted and cancelled while others are written.

One thread drives an engine by `step`; `submit` and `cancel` may be called from any. A response is a function of its
prompt, settings, key and uid alone: each prompt is read by itself, whole or in chunks, some of which may have been read
for another (`shelf.Shelf`), and all slots decode by one program, whoever is in them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.generation.programs import Programs, Room, padded, power_of_two
from rlhfjax.generation.sampling import SamplingParams, by_row
from rlhfjax.generation.session import Step
from rlhfjax.generation.shelf import Shelf

_NEVER = -1  # an id that no model emits
_SHORT = 16  # tokens that are left of a prompt for which a chunk would be too wide
_BESIDE = 2  # chunks that are read between two steps of responses under way


@dataclass(eq=False)
class Response:
    """A response under way. `finish_reason` is None until it ends: "stop", "length" or "cancelled".

    Log-probabilities are nats of each token, of the whole distribution at its temperature. `ends` is told of every
    token as it comes, and answers whether it ends the response.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    key: jax.Array
    uid: int = 0
    ends: Callable[[int], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class _Reading:
    """A prompt of which `start` tokens were read into `slot`."""

    response: Response
    slot: int
    start: int


class Engine:
    """The slots of a model, and who waits for one: first come, first served.

    `block` tokens are drawn in a call of the device; more cost less each, and come and end later.
    """

    def __init__(self, programs: Programs, room: Room, block: int = 1):
        self.room, self._programs, self._block = room, programs, block
        self._weights, self._slots = programs.weights(room.slots), programs.open(room)
        self._waiting: deque[Response] = deque()
        self._writing: list[Response | None] = [None] * room.slots
        self._shelf = Shelf(room.slots, room.chunk) if room.chunk else None
        self._reading: _Reading | None = None  # one prompt at a time, so that the next finds its chunks

    @property
    def busy(self) -> bool:
        """Whether a response waits or is being written."""
        return bool(self._waiting or self._reading) or any(self._writing)

    @property
    def free(self) -> int:
        """Slots that the next step can give to responses that wait."""
        taken = self._reading is not None and not self._reading.response.finish_reason
        return sum(one is None or one.finish_reason is not None for one in self._writing) - taken

    @property
    def shared(self) -> int:
        """Tokens of prompts that were not read again, because a slot held them."""
        return self._shelf.shared if self._shelf else 0

    def submit(self, response: Response) -> Response:
        """Let a response wait for a slot. Raises ConfigError as `check`."""
        self.check(response)
        self._waiting.append(response)
        return response

    def check(self, response: Response) -> None:
        """Raises ConfigError when a response is more than the session has room for."""
        asked, room, limit = response.sampling, self.room, self.room.together
        prompt, new, stops = len(response.prompt), asked.max_new_tokens, 1 + len(asked.stop_ids)
        if not 1 <= prompt <= room.prompt or not 1 <= new <= room.new_tokens or prompt + new > limit:
            raise ConfigError(
                f"expected a prompt of 1 to {room.prompt} tokens and a response of 1 to {room.new_tokens}, {limit} "
                f"together, got {prompt} and {new}; ask for less, or open a session with more room"
            )
        if len(asked.bias) > room.biases:
            raise ConfigError(f"expected a bias of at most {room.biases} tokens, got {len(asked.bias)}")
        if stops > room.stops or asked.top_log_probs > room.top_log_probs or asked.speculation:
            raise ConfigError(
                f"expected at most {room.stops} stop ids, {room.top_log_probs} top_log_probs and no draft tokens, got "
                f"{stops}, {asked.top_log_probs} and {asked.speculation}; ask for less, or open a session with more"
            )

    def cancel(self, response: Response) -> None:
        """End a response where it is; the next step gives its slot away. Nothing happens to one that has ended."""
        response.finish_reason = response.finish_reason or "cancelled"

    def warm_up(self) -> None:
        """Compile every program that responses may need, by writing some."""
        limit = self.room.together
        lengths = [self.room.prompt]
        if self.room.chunk:
            lengths = [_SHORT, self.room.chunk]
        else:
            width = self._programs.narrowest
            while width < self.room.prompt:
                lengths.append(width)
                width *= 2
        for length, new in [(1, 2), *((min(length, limit - 1), 1) for length in lengths)]:
            asked = SamplingParams(min(new, limit - length), _NEVER, 0)
            for _ in self.follow(self.submit(Response([0] * length, asked, jax.random.key(0)))):
                pass

    def step(self) -> None:
        """Admit what waits to free slots, then draw the next block of every response."""
        if self._shelf:
            self._read(self._shelf)
        else:
            for slot in range(self.room.slots):
                self._fill(slot)
        if any(self._writing):
            kept = np.asarray([one is not None for one in self._writing])
            self._slots, drawn = self._programs.step(self._weights, self._slots, kept, count=self._block)
            drawn = jax.device_get(drawn)
            for place in range(self._block):
                self._hand_out(jax.tree.map(lambda x, place=place: x[place], drawn), self._writing)
        self._release()

    def follow(self, response: Response) -> Iterator[int]:
        """The tokens of a response as they come; the engine steps whenever there is none."""
        seen = 0
        while True:
            yield from response.tokens[seen:]
            seen = len(response.tokens)
            if response.finish_reason:
                return
            self.step()

    def _fill(self, slot: int) -> None:
        """Give a slot, if it is free, to the first response that waits and does not end with its first token."""
        self._release()
        while self._writing[slot] is None and self._waiting:
            response = self._waiting.popleft()
            if response.finish_reason:
                continue
            width = max(self._programs.narrowest, power_of_two(len(response.prompt)))
            batch = padded([response.prompt], 1, min(width, self.room.prompt), response.sampling.pad_id)
            batch = replace(batch, uid=jnp.asarray([response.uid], jnp.int32))
            rows = self._row(response)
            place = jnp.asarray([slot], jnp.int32)
            made = self._programs.admit(self._weights, self._slots, place, batch, response.key, rows)
            self._slots, self._writing[slot] = made[0], response
            self._hand_out(jax.device_get(made[1]), [response])
            self._release()

    def _read(self, shelf: Shelf) -> None:
        """Read chunks of prompts that wait, in their order, and begin the responses whose prompts were read.

        All of them while nobody is writing, else a few: who is under way waits for those.
        """
        left = _BESIDE
        self._release()
        while left or not any(self._writing):
            if self._reading is None or self._reading.response.finish_reason:
                self._reading = None
                response = self._next()
                if response is None:
                    return
                free = [slot for slot, one in enumerate(self._writing) if one is None]
                place = shelf.place(response.prompt, free)
                self._reading = _Reading(response, place.slot, place.start)
                self._read_chunk(shelf, self._reading, place.source)
            else:
                self._read_chunk(shelf, self._reading, self._reading.slot)
            left = max(left - 1, 0)

    def _next(self) -> Response | None:
        """The first response that waits and has not ended, if there is a slot for it."""
        while self._waiting and not all(self._writing):
            response = self._waiting.popleft()
            if not response.finish_reason:
                return response
        return None

    def _read_chunk(self, shelf: Shelf, reading: _Reading, source: int) -> None:
        prompt, start = reading.response.prompt, reading.start
        tokens = prompt[start : start + shelf.chunk]
        count, width = len(tokens), _SHORT if len(tokens) <= _SHORT < shelf.chunk else shelf.chunk
        row = np.zeros((1, width), np.int32)
        row[0, :count] = tokens
        place, begin, read = (np.asarray([x], np.int32) for x in (reading.slot, start, count))
        self._slots, hidden = self._programs.read(
            self._weights, self._slots, place, np.asarray([source], np.int32), begin, row, read
        )
        shelf.read(reading.slot, tokens)
        reading.start += count
        if reading.start < len(prompt):
            return
        response, self._reading = reading.response, None
        uid, rows = np.asarray([response.uid], np.int32), self._row(response)
        made = self._programs.begin(self._weights, self._slots, place, hidden, read - 1, uid, response.key, rows)
        self._slots, self._writing[reading.slot] = made[0], response
        self._hand_out(jax.device_get(made[1]), [response])
        self._release()

    def _row(self, response: Response) -> Any:
        return by_row([response.sampling], self.room.stops, self.room.top_log_probs, self.room.biases)

    def _release(self) -> None:
        """Make room where a response has ended. Its slot draws on, unread, until the next call of the device."""
        for slot, response in enumerate(self._writing):
            if response and response.finish_reason:
                self._writing[slot] = None

    def _hand_out(self, new: Step, responses: Sequence[Response | None]) -> None:
        """Give each response its token of one step, and say why it ends if it does."""
        for row, response in enumerate(responses):
            if response is None or response.finish_reason or not new.written[row]:
                continue
            token, count = int(new.drawn.token[row]), response.sampling.top_log_probs
            response.tokens.append(token)
            response.log_probs.append(float(new.drawn.log_prob[row]))
            if count:
                pairs = zip(new.drawn.top_ids[row, :count], new.drawn.top_log_probs[row, :count], strict=True)
                response.top_log_probs.append({int(index): float(value) for index, value in pairs})
            if new.stopped[row] or (response.ends and response.ends(token)):
                response.finish_reason = "stop"
            elif len(response.tokens) == response.sampling.max_new_tokens:
                response.finish_reason = "length"
