"""Responses that come a token at a time: prompts are submitted and cancelled while others are written.

One thread drives an engine by `step`; `submit` and `cancel` may be called from any. A response is a function of its
prompt, settings, key and uid alone: each prompt is read by itself, and all slots decode by one program, whoever is in
them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.generation.programs import Programs, Room, padded, power_of_two
from rlhfjax.generation.sampling import SamplingParams, by_row
from rlhfjax.generation.session import Step


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


class Engine:
    """The slots of a model, and who waits for one: first come, first served.

    `block` tokens are drawn in a call of the device; more cost less each, and come and end later.
    """

    def __init__(self, programs: Programs, room: Room, block: int = 1):
        self.room, self._programs, self._block = room, programs, block
        self._weights, self._slots = programs.weights(room.slots), programs.open(room)
        self._waiting: deque[Response] = deque()
        self._writing: list[Response | None] = [None] * room.slots

    @property
    def busy(self) -> bool:
        """Whether a response waits or is being written."""
        return bool(self._waiting) or any(self._writing)

    @property
    def free(self) -> int:
        """Slots that the next step can give to responses that wait."""
        return sum(one is None or one.finish_reason is not None for one in self._writing)

    def submit(self, response: Response) -> Response:
        """Let a response wait for a slot. Raises ConfigError when it is more than the session has room for."""
        asked, room, limit = response.sampling, self.room, self.room.context or self.room.prompt + self.room.new_tokens
        prompt, new, stops = len(response.prompt), asked.max_new_tokens, 1 + len(asked.stop_ids)
        if not 1 <= prompt <= room.prompt or not 1 <= new <= room.new_tokens or prompt + new > limit:
            raise ConfigError(
                f"expected a prompt of 1 to {room.prompt} tokens and a response of 1 to {room.new_tokens}, {limit} "
                f"together, got {prompt} and {new}; ask for less, or open a session with more room"
            )
        if stops > room.stops or asked.top_log_probs > room.top_log_probs or asked.speculation:
            raise ConfigError(
                f"expected at most {room.stops} stop ids, {room.top_log_probs} top_log_probs and no draft tokens, got "
                f"{stops}, {asked.top_log_probs} and {asked.speculation}; ask for less, or open a session with more"
            )
        self._waiting.append(response)
        return response

    def cancel(self, response: Response) -> None:
        """End a response where it is; the next step gives its slot away. Nothing happens to one that has ended."""
        response.finish_reason = response.finish_reason or "cancelled"

    def step(self) -> None:
        """Admit what waits to free slots, then draw the next block of every response."""
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
            rows = by_row([response.sampling], self.room.stops, self.room.top_log_probs)
            place = jnp.asarray([slot], jnp.int32)
            made = self._programs.admit(self._weights, self._slots, place, batch, response.key, rows)
            self._slots, self._writing[slot] = made[0], response
            self._hand_out(jax.device_get(made[1]), [response])
            self._release()

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
