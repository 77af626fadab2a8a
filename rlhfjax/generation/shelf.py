"""What the slots of an engine hold of prompts, so that the next one reads only what none of them holds.

A prompt is read in chunks of one size that begin at multiples of it, and only whole chunks are shared. So the keys and
values of a token are computed by one program from the same numbers whoever read it, and a response has the same bits
with a shared prefix as without.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a prompt goes: its slot, and the slot that holds its first `start` tokens."""

    slot: int
    source: int
    start: int


class Shelf:
    """Tokens that each slot holds whole chunks of, and when it was given away last."""

    def __init__(self, slots: int, chunk: int):
        self.chunk, self.shared = chunk, 0  # tokens that were not read again
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._given, self._count = [0] * slots, 0

    def place(self, prompt: Sequence[int], free: Iterable[int]) -> Place:
        """A free slot for a prompt: one that it can go on from, else the one that was given away longest ago.

        The last token is always read, because its state says how the response begins.
        """
        most = (len(prompt) - 1) // self.chunk * self.chunk
        common = [self._common(held, prompt, most) for held in self._held]
        start, places = max(common), list(free)
        # Where all that a slot holds is the beginning of this prompt, nothing is lost by going on there.
        going_on = [slot for slot in places if start and len(self._held[slot]) == common[slot] == start]
        slot = min(going_on or places, key=lambda slot: self._given[slot])
        source = slot if common[slot] == start else common.index(start)
        self._held[slot] = list(prompt[:start])
        self._count += 1
        self._given[slot] = self._count
        self.shared += start
        return Place(slot, source, start)

    def read(self, slot: int, tokens: Sequence[int]) -> None:
        """Note a chunk that was read into a slot behind what it holds; one that is not whole is not shared."""
        if len(tokens) == self.chunk:
            self._held[slot].extend(tokens)

    def _common(self, held: list[int], prompt: Sequence[int], most: int) -> int:
        count = 0
        while count < min(most, len(held)):
            if held[count : count + self.chunk] != list(prompt[count : count + self.chunk]):
                break
            count += self.chunk
        return count
