"""Record kinds that follow from another: a prompt from whatever has one, a demonstration from the best response."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields
from rlhfjax.data.labels import meaning
from rlhfjax.data.layouts.layout import Convert, Layout, Object, Way
from rlhfjax.data.records import answered, good_answer

_EMPTY = "rows whose best response is empty"
_UNLABELLED = "rows whose label is false (bad answers are never demonstrations)"


def layout(
    name: str,
    fields: str,
    fits: Callable[[Object], bool],
    kind: str,
    convert: Convert,
    explain: str,
    omits: str = "",
    asked: Convert | None = None,
    **more: Any,
) -> Layout:
    """A layout that was made for one record kind, with the other kinds that follow from it; `more` is the layout's.

    `asked` gives the prompt where that shall leave the answer beside it, for a reward to compare with.
    """
    way = Way(explain, convert, omits)
    follows = {other: make(way) for other, make in _FOLLOWS[kind].items()}
    if asked:
        follows["prompt"] = follows["prompt"]._replace(convert=asked)
    return Layout(name, fields, fits, {kind: way, **follows}, **more)


def _each(convert: Convert, change: Callable[[Object], list[Object]], fields: Fields) -> list[Object]:
    return [changed for row in convert(fields) for changed in change(row)]


def _following(change: Callable[[Object], list[Object]], words: str, omits: str, way: Way) -> Way:
    both = "; ".join(reason for reason in (way.omits, omits) if reason)
    return Way(f"{way.explain}; {words}", partial(_each, way.convert, change), both)


def _best(row: Object) -> list[Object]:
    """The response of the best rank (the first of those that share it) as the answer, if there is text in it."""
    if "responses" in row:
        ranked = dict(row)
        responses, ranks = ranked.pop("responses"), ranked.pop("ranks")
        answer = responses[min(range(len(ranks)), key=ranks.__getitem__)]
    else:
        ranked = {name: value for name, value in row.items() if name != "rejected"}
        answer = ranked.pop("chosen")
    return [answered(ranked, answer)] if answer.strip() else []


def _good(row: Object) -> list[Object]:
    """An unpaired answer that people found good; none for one that they did not."""
    return [good_answer(row)] if meaning(row.get("label")) else []


def _asked(row: Object) -> list[Object]:
    """What is to be answered: messages without the last answer, or the prompt."""
    rest = {
        name: value
        for name, value in row.items()
        if name not in ("completion", "responses", "ranks", "chosen", "rejected", "label", "labeler_id")
    }
    messages = rest.get("messages")
    if messages and messages[-1].get("role") == "assistant":
        rest["messages"] = messages[:-1]
    return [rest]


_prompts = partial(_following, _asked, "of it the prompt alone", "")
_FOLLOWS: Mapping[str, Mapping[str, Callable[[Way], Way]]] = {
    "comparison": {
        "demonstration": partial(_following, _best, "of it the best response as the answer", _EMPTY),
        "prompt": _prompts,
    },
    "unpaired": {
        "demonstration": partial(_following, _good, "of it the answers with label true", _UNLABELLED),
        "prompt": _prompts,
    },
    "demonstration": {"prompt": _prompts},
    "prompt": {},
    "document": {},
    "rating": {},
}
