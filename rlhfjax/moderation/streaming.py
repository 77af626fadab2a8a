"""An answer under way: pieces go in, what may be sent comes out, and no character of a flagged span ever does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhfjax.moderation.combining import How, highest, together
from rlhfjax.moderation.verdicts import Backend, BackendError, Judgement, Look, Verdict

Decide = Callable[[Judgement, str | None], Verdict]


@dataclass
class _Watched:
    """What one back end has seen of an answer: all before `settled` is past, `looked` is how far it has read."""

    backend: Backend
    settled: int = 0
    looked: int = 0
    found: Judgement | None = None
    failed: str | None = None


class Guard:
    """Holds back of an answer what may yet become part of a flagged span.

    `decide` makes a verdict of what the back ends find together, and of a failure; only a verdict that stops an answer
    counts before its end. `between` parts what was sent already from the filler that follows it.
    """

    def __init__(self, backends: Sequence[Backend], how: How, decide: Decide, between: str = "\n\n"):
        self._watched = [_Watched(backend) for backend in backends]
        self._how: How = how
        self._decide, self._between = decide, between
        self._text, self._sent = "", 0
        self.verdict: Verdict | None = None  # once the answer was stopped, or has ended

    @property
    def stopped(self) -> bool:
        """Whether the answer was cut off: nothing more of it is sent, and the model need not go on."""
        return self.verdict is not None and self.verdict.stops

    @property
    def text(self) -> str:
        """The answer as the model gave it, what was withheld with it."""
        return self._text

    def feed(self, piece: str) -> str:
        """What may be sent after another piece of the answer; with the filler, where this piece stops it."""
        if self.verdict is not None:
            return ""
        self._text += piece
        return self._look(ended=False)

    def end(self) -> str:
        """The rest of an answer that has ended, or the filler in its place; the verdict is there afterwards."""
        return "" if self.verdict is not None else self._look(ended=True)

    def _look(self, ended: bool) -> str:
        for watched in self._watched:
            self._see(watched, ended)
            if self._how == "first" and not watched.failed:
                break
        verdict = self._decided()
        if verdict.stops:
            self.verdict = verdict
            free = self._sent if verdict.failed else self._free()
            return self._released(free) + self._filling(verdict)
        if ended:
            self.verdict = verdict
            return self._released(len(self._text))
        return self._released(self._free())

    def _see(self, watched: _Watched, ended: bool) -> None:
        new = len(self._text) - watched.looked
        if watched.failed or not self._text or (new < watched.backend.every and not ended):
            return
        try:
            look = watched.backend.look(self._text[watched.settled :], ended)
        except BackendError as why:
            watched.failed = f"{watched.backend.name}: {why}"
            return
        watched.found = highest(watched.found, look.judgement, watched.settled)
        watched.looked = len(self._text)
        watched.settled += self._past(look)

    def _past(self, look: Look) -> int:
        """How much of a part is past: nothing that this back end alone would stop, until all have had their say."""
        if not self._stops(look.judgement):
            return look.settled
        starts = [
            span.start for span in look.judgement.spans if self._stops(Judgement({span.category: span.score}, (span,)))
        ]
        return min(look.settled, *starts) if starts else 0

    def _stops(self, judgement: Judgement) -> bool:
        return self._decide(judgement, None).stops

    def _asked(self) -> list[_Watched]:
        """Those whose word counts now."""
        answering = [watched for watched in self._watched if not watched.failed]
        return answering[:1] if self._how == "first" else answering

    def _decided(self) -> Verdict:
        found = [watched.found for watched in self._asked() if watched.found is not None]
        failures = [watched.failed for watched in self._watched if watched.failed]
        counts = failures and (self._how != "first" or len(failures) == len(self._watched))
        return self._decide(together(self._how, found), failures[0] if counts else None)

    def _free(self) -> int:
        """How many characters of the answer no back end can make part of a flagged span any more."""
        return min((watched.settled for watched in self._asked()), default=len(self._text))

    def _released(self, until: int) -> str:
        until = max(until, self._sent)
        part, self._sent = self._text[self._sent : until], until
        return part

    def _filling(self, verdict: Verdict) -> str:
        if verdict.filler is None:
            return ""
        return (self._between if self._sent else "") + verdict.filler
