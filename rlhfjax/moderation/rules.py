"""Rules as a back end: intents as phrases in a row, matched word by word, over whole texts and over texts that go on.

A pattern is a row of parts, such as an asking and a harm, each a list of phrases, with a few words between two of them.
That such a row is short is what a stream needs: only what may still become a match is kept back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhfjax.moderation.verdicts import Judgement, Look, Span
from rlhfjax.moderation.words import Word, words_of

ANY_ENDING = "*"


@dataclass(frozen=True)
class Token:
    """One word of a phrase; with `prefix` any word that begins with it."""

    forms: tuple[str, ...]
    prefix: bool = False

    def fits(self, word: Word) -> bool:
        """Whether one of the readings of a word is this one."""
        if self.prefix:
            return any(form.startswith(self.forms) for form in word.forms)
        return any(form in self.forms for form in word.forms)


Phrase = tuple[Token, ...]


def phrase_of(text: str) -> Phrase:
    """The words of a phrase as texts are read; one that ends in * stands for all that begin so. Empty without any."""
    tokens: list[Token] = []
    for part in text.split():
        words, _ = words_of(part.rstrip(ANY_ENDING))
        tokens += [Token(word.forms[:1]) for word in words]
        if words and part.endswith(ANY_ENDING):
            tokens[-1] = Token(words[-1].forms[:1], prefix=True)
    return tuple(tokens)


class _Part:
    """The phrases that may stand at one place of a pattern, found by their first words."""

    def __init__(self, phrases: Sequence[Phrase]):
        self._exact: dict[str, list[Phrase]] = {}
        self._prefixed: dict[str, list[Phrase]] = {}
        for phrase in phrases:
            table = self._prefixed if phrase[0].prefix else self._exact
            table.setdefault(phrase[0].forms[0], []).append(phrase)
        self._lengths = sorted({len(prefix) for prefix in self._prefixed})

    def beginning_with(self, word: Word) -> Iterator[Phrase]:
        """The phrases whose first word it is."""
        for form in word.forms:
            yield from self._exact.get(form, ())
            for length in self._lengths:
                if length <= len(form):
                    yield from self._prefixed.get(form[:length], ())


@dataclass(frozen=True)
class Pattern:
    """Phrases of each part in this order, at most `within` words between two parts, none of `unless` among those.

    A match gives its category the score.
    """

    category: str
    parts: tuple[tuple[Phrase, ...], ...]
    within: int = 3
    unless: tuple[Phrase, ...] = ()
    score: float = 1.0

    @cached_property
    def _tables(self) -> list[_Part]:
        return [_Part(phrases) for phrases in self.parts]

    @cached_property
    def _between(self) -> _Part:
        return _Part(self.unless)

    def match(self, words: Sequence[Word], first: int) -> tuple[int | None, bool]:
        """Where a match that begins with a word ends (exclusive), if one does; and whether more words might."""
        return self._rest(words, first, 0, 0)

    def _rest(self, words: Sequence[Word], place: int, part: int, gap: int) -> tuple[int | None, bool]:
        """The same of the parts from one on, up to `gap` words from a place."""
        open_ended = False
        for at in range(place, place + gap + 1):
            if at >= len(words):
                return None, True
            for phrase in self._tables[part].beginning_with(words[at]):
                stop = at + len(phrase)
                if not all(token.fits(word) for token, word in zip(phrase, words[at:stop], strict=False)):
                    continue
                if stop > len(words):
                    open_ended = True
                elif part + 1 == len(self.parts):
                    return stop, open_ended
                else:
                    end, more = self._rest(words, stop, part + 1, self.within)
                    open_ended |= more
                    if end is not None:
                        return end, open_ended
            if self._forbids(words, at):
                break
        return None, open_ended

    def _forbids(self, words: Sequence[Word], at: int) -> bool:
        phrases = self._between.beginning_with(words[at])
        return any(
            at + len(phrase) <= len(words) and all(map(Token.fits, phrase, words[at : at + len(phrase)]))
            for phrase in phrases
        )


class Rules:
    """Patterns as a back end."""

    every = 1

    def __init__(self, patterns: Sequence[Pattern], name: str = "rules"):
        self.name, self._patterns = name, tuple(patterns)
        firsts: dict[Phrase, list[Pattern]] = {}
        for pattern in self._patterns:
            for phrase in pattern.parts[0]:
                firsts.setdefault(phrase, []).append(pattern)
        self._firsts, self._starting = _Part(list(firsts)), firsts
        self._known = tuple(dict.fromkeys(pattern.category for pattern in self._patterns))

    def judge(self, texts: Sequence[str]) -> list[Judgement]:
        """A judgement of each text: 0 in the categories that the rules know and find nothing of."""
        return [self.look(text, ended=True).judgement for text in texts]

    def look(self, text: str, ended: bool) -> Look:
        """Matches among the words that are whole; settled is all before the first that may yet become one."""
        words, whole = words_of(text)
        whole = len(words) if ended else whole
        settled = words[whole].start if whole < len(words) else len(text)
        spans, complete = [], words[:whole]
        for first in range(whole):
            for pattern in self._starting_at(complete[first]):
                end, more = pattern.match(complete, first)
                if end is not None:
                    spans.append(Span(complete[first].start, complete[end - 1].end, pattern.category, pattern.score))
                if more and not ended:
                    settled = min(settled, complete[first].start)
        scores = dict.fromkeys(self._known, 0.0)
        for span in spans:
            scores[span.category] = max(scores[span.category], span.score)
        return Look(Judgement(scores, tuple(spans)), settled)

    def _starting_at(self, word: Word) -> list[Pattern]:
        phrases = self._firsts.beginning_with(word)
        found = (pattern for phrase in phrases for pattern in self._starting[phrase])
        return list(dict.fromkeys(found))
