"""Both sides of a model: a flagged input is answered without it, a flagged output replaced before it is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhfjax.moderation.combining import How, judged, together
from rlhfjax.moderation.streaming import Guard
from rlhfjax.moderation.verdicts import ACTIONS, Action, Backend, Judgement, Side, Verdict

Note = Callable[[str, Verdict], None]


class Treatment(NamedTuple):
    """What becomes of one category on each side, from which score on, and what is said instead."""

    input: Action
    output: Action
    threshold: float
    filler: str


class Moderator:
    """A policy at work. It may be used from several threads at once.

    `treatments` has one for each category; `note` is told of each text that is flagged, with its verdict. Where a back
    end fails, `on_error: closed` answers with the filler `unavailable`, `open` goes on without that back end.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        treatments: Mapping[str, Treatment],
        how: How = "any",
        on_error: Literal["closed", "open"] = "closed",
        unavailable: str = "I cannot answer that at the moment.",
        note: Note = lambda text, verdict: None,
    ):
        self.backends, self._treatments = tuple(backends), dict(treatments)
        self.how: How = how
        self._on_error, self._unavailable, self._note = on_error, unavailable, note

    def input(self, text: str) -> Verdict:
        """The verdict of what somebody wrote: where it `stops`, the model is not to be called."""
        return self._judged("input", [text])[0]

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> Verdict:
        """The strongest verdict of the messages of a conversation, each by itself, whoever has written it."""
        verdicts = [self.input(_text(message.get("content"))) for message in messages]
        return max(verdicts, key=lambda verdict: ACTIONS.index(verdict.action), default=Verdict("input"))

    def output(self, text: str) -> Verdict:
        """The verdict of a whole answer: where it `stops`, `filler` is what its reader gets, or nothing."""
        return self._judged("output", [text])[0]

    def outputs(self, texts: Sequence[str]) -> list[Verdict]:
        """The verdicts of whole answers, for which each back end is asked once."""
        return self._judged("output", texts)

    def guard(self) -> "Guarded":
        """For one answer that is sent while it is made."""
        return Guarded(self)

    def reply(self, prompt: str, model: Callable[[], Iterable[str]]) -> Iterator[str]:
        """The pieces of an answer that may be sent. `model` is called only where the input does not stop.

        It gives the pieces of its answer, and is left alone as soon as these are stopped.
        """
        verdict = self.input(prompt)
        if verdict.stops:
            yield from filter(None, [verdict.filler])
            return
        guard = self.guard()
        for piece in model():
            if sent := guard.feed(piece):
                yield sent
            if guard.stopped:
                return
        if rest := guard.end():
            yield rest

    def decide(self, side: Side, found: Judgement, failed: str | None = None) -> Verdict:
        """The verdict that the policy makes of a judgement, and of a failure."""
        flagged = tuple(name for name in found.scores if self._flags(side, name, found.scores[name]))
        spans = tuple(span for span in found.spans if span.category in flagged)
        deciding = max(flagged, key=lambda name: self._weight(side, name, found), default=None)
        verdict = Verdict(side, "allow", None, found.scores, flagged, None, spans, failed)
        if deciding:
            treatment = self._treatments[deciding]
            action: Action = getattr(treatment, side)
            filler = treatment.filler if action == "replace" else None
            verdict = Verdict(side, action, deciding, found.scores, flagged, filler, spans, failed)
        if failed and self._on_error == "closed" and not verdict.stops:
            return Verdict(side, "replace", None, found.scores, flagged, self._unavailable, spans, failed)
        return verdict

    def _flags(self, side: Side, name: str, score: float) -> bool:
        treatment = self._treatments.get(name)
        return treatment is not None and getattr(treatment, side) != "allow" and score >= treatment.threshold

    def _weight(self, side: Side, name: str, found: Judgement) -> tuple[int, float]:
        return ACTIONS.index(getattr(self._treatments[name], side)), found.scores[name]

    def _judged(self, side: Side, texts: Sequence[str]) -> list[Verdict]:
        asked = [text for text in texts if text]
        found, failed = judged(self.backends, self.how, asked) if asked else ([], None)
        each = iter(
            [self.decide(side, together(self.how, [*of_one]), failed) for of_one in _by_text(found, len(asked))]
        )
        verdicts = [next(each) if text else Verdict(side) for text in texts]
        for text, verdict in zip(texts, verdicts, strict=True):
            self.noted(text, verdict)
        return verdicts

    def noted(self, text: str, verdict: Verdict) -> None:
        """Tell of a text that is flagged, or that a back end failed on."""
        if verdict.action != "allow" or verdict.failed:
            self._note(text, verdict)


class Guarded(Guard):
    """A `Guard` by a moderator's policy; what it finds is noted once, when the answer is stopped or has ended."""

    def __init__(self, moderator: Moderator):
        self._moderator = moderator
        super().__init__(moderator.backends, moderator.how, lambda found, why: moderator.decide("output", found, why))

    def _look(self, ended: bool) -> str:
        sent = super()._look(ended)
        if self.verdict is not None:
            self._moderator.noted(self.text, self.verdict)
        return sent


def _by_text(found: Sequence[Sequence[Judgement]], count: int) -> Iterator[tuple[Judgement, ...]]:
    """The judgements of each text, of lists that back ends gave; nothing of each where none gave any."""
    return zip(*found, strict=True) if found else iter([()] * count)


def _text(content: Any) -> str:
    """The text of a message: its content, or those parts of it that are text."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
