"""The text of a response while its tokens come: no half characters, and an end at stop strings."""

from collections.abc import Sequence

from rlhfjax.text.loading import AnyTokenizer

_UNKNOWN = "\ufffd"  # what stands for bytes that are no character, or not yet
_KEPT, _CHECKED = 64, 8  # tokens decoded again with each new one; tokens that must agree before fewer are


class TextStream:
    """Text of ids that go on after the id `after`, given out in pieces.

    All pieces joined are `tokenizer.decode_continuation` of all ids, cut before the first of the `stop` strings that it
    contains, wherever that begins and ends within tokens. A piece holds back what a later token may change: the bytes
    of a character that is not whole, and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: AnyTokenizer, after: int | None = None, stop: Sequence[str] = ()):
        self.stopped = False  # whether a stop string has come
        self._tokenizer, self._after, self._stop = tokenizer, after, tuple(stop)
        self._ids: list[int] = []  # those that are decoded again with each new one, behind `after`
        self._given = 0  # characters of their text that were given out
        self._mark: tuple[int, str] | None = None

    def add(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._ids.append(token)
        text = self._decoded(self._ids)
        found = [place for stop in self._stop if (place := text.find(stop, self._given)) >= 0]
        if found:
            self.stopped = True
            return self._give(text, min(found))
        certain = self._certain(text)
        piece = self._give(text, self._before_stop(text[:certain]))
        self._forget(text, certain)
        return piece

    def end(self) -> str:
        """What was held back and is certain now that nothing follows; "" after a stop string."""
        if self.stopped:
            return ""
        text = self._decoded(self._ids)
        return self._give(text, len(text))

    def _decoded(self, ids: Sequence[int], after: int | None = None) -> str:
        return self._tokenizer.decode_continuation(ids, self._after if after is None else after)

    def _give(self, text: str, until: int) -> str:
        piece, self._given = text[self._given : until], max(self._given, until)
        return piece

    def _certain(self, text: str) -> int:
        """How many characters stay whatever follows."""
        whole = len(text.rstrip(_UNKNOWN))
        others = len(self._ids)
        while others and self._ids[others - 1] in self._tokenizer.byte_ids:
            others -= 1
        return whole if others == len(self._ids) else min(whole, len(self._decoded(self._ids[:others])))

    def _before_stop(self, text: str) -> int:
        """How many characters are before the longest end of the text that a stop string may begin with."""
        for start in range(max(self._given, len(text) - max(map(len, self._stop), default=1) + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)

    def _forget(self, text: str, certain: int) -> None:
        """Decode fewer ids from now on, once what follows a place is seen to be decoded as it is in the whole."""
        if self._mark is None:
            if len(self._ids) >= _KEPT and certain == len(text):
                self._mark = len(self._ids), text
            return
        place, head = self._mark
        if len(self._ids) < place + _CHECKED or self._given < len(head):
            return
        if text == head + self._decoded(self._ids[place:], self._ids[place - 1]):
            self._after, self._ids, self._given = self._ids[place - 1], self._ids[place:], self._given - len(head)
        self._mark = None
