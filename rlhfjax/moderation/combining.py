"""Several back ends as one judge: what they find, taken together, and what a failure of one of them means."""

from collections.abc import Mapping, Sequence
from typing import Literal

from rlhfjax.moderation.verdicts import Backend, BackendError, Judgement

How = Literal["any", "all", "first"]


def together(how: How, found: Sequence[Judgement]) -> Judgement:
    """The judgement of all: with `any` the highest score of a category, with `all` the lowest, and `first` the first's.

    A back end that does not know a category has no say in it. Where it was seen is kept of each.
    """
    if how == "first":
        return found[0] if found else Judgement({})
    chosen = max if how == "any" else min
    names = dict.fromkeys(name for judgement in found for name in judgement.scores)
    scores = {name: chosen(each.scores[name] for each in found if name in each.scores) for name in names}
    return Judgement(scores, tuple(dict.fromkeys(span for judgement in found for span in judgement.spans)))


def judged(backends: Sequence[Backend], how: How, texts: Sequence[str]) -> tuple[list[list[Judgement]], str | None]:
    """The judgements of texts, a list for each back end that gave them, and the first failure that counts.

    With `first` they are asked in order until one answers, and it counts only where none did.
    """
    found: list[list[Judgement]] = []
    failed: str | None = None
    for backend in backends:
        try:
            found.append(backend.judge(texts))
        except BackendError as why:
            failed = failed or f"{backend.name}: {why}"
            continue
        if how == "first":
            return found, None
    return found, failed


def highest(before: Judgement | None, now: Judgement, offset: int) -> Judgement:
    """What was found in a text so far, with what a look at the part of it from `offset` on has found."""
    spans = tuple(span._replace(start=span.start + offset, end=span.end + offset) for span in now.spans)
    if before is None:
        return Judgement(now.scores, spans)
    scores: Mapping[str, float] = {
        name: max(before.scores.get(name, 0.0), now.scores.get(name, 0.0)) for name in {**before.scores, **now.scores}
    }
    return Judgement(scores, tuple(dict.fromkeys((*before.spans, *spans))))
