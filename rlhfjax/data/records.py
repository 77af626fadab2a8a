"""The schemas of records, and a parser that says of every wrong one what is wrong with it.

Fields that a schema does not know are kept under `extra`. Messages of errors name places,
fields and types, never the content: prompts and labels are private.
"""

import difflib
from collections.abc import Callable
from typing import Any

from rlhfjax.data.fields import Fields, check_values, type_name
from rlhfjax.data.labels import meaning, take_label
from rlhfjax.data.messages import conversation, prompt, settings
from rlhfjax.errors import ConfigError, DataError

_MAX_RANK = 2**31 - 1

Record = dict[str, Any]


def parse_record(kind: str, obj: Any, where: str) -> Record:
    """One decoded JSON object as the canonical record of its kind; `where` (file:line) begins every error.

    Canonical: `messages` where the object has them, else `prompt`; a comparison always has `responses` and `ranks`
    (1 best, equal = tie); all unknown fields are under `extra`, and a field that is absent stays absent.

    Raises DataError where a field is missing, of the wrong type or out of range; ConfigError for an unknown kind.
    """
    check_kind(kind)
    if not isinstance(obj, dict):
        raise DataError(f"{where}: expected an object with the fields of a {kind}, got {type_name(obj)}")
    check_values(obj, where)
    fields = Fields(kind, obj, where)
    record = _PARSERS[kind](fields)
    return {**record, **fields.rest()}


def check_kind(kind: str) -> None:
    """Raises ConfigError, naming the nearest kind, unless `kind` is one of KINDS."""
    if kind not in _PARSERS:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"expected a record kind among {', '.join(KINDS)}, got {kind!r}{hint}")


def answered(asked: Record, answer: str) -> Record:
    """A prompt, in either form, with its answer."""
    if asked.get("messages") is None:
        return {**asked, "completion": answer}
    return {**asked, "messages": [*asked["messages"], {"role": "assistant", "content": answer}]}


def good_answer(unpaired: Record) -> Record:
    """The demonstration in an unpaired record whose label is true."""
    rest = {name: value for name, value in unpaired.items() if name not in ("completion", "label")}
    return answered(rest, unpaired["completion"])


def _document(fields: Fields) -> Record:
    return {"text": fields.text("text")}


def _demonstration(fields: Fields) -> Record:
    if meaning(fields.left.get("label")) is False:
        raise fields.error("label", "a good answer to learn from", "false", "read the file as unpaired records")
    fields.not_both("messages", "prompt")
    fields.not_both("messages", "completion")
    if "messages" in fields:
        return {**conversation(fields, "assistant"), **fields.ids("prompt_id")}
    texts = {"prompt": fields.text("prompt"), "completion": fields.text("completion")}
    return {**texts, **settings(fields), **fields.ids("prompt_id")}


def _unpaired(fields: Fields) -> Record:
    """An answer with a label, true where people found it good (Ethayarajh et al. 2024, KTO)."""
    asked = prompt(fields)
    answer = {"completion": fields.text("completion"), "label": take_label(fields, "label")}
    return {**asked, **answer, **fields.ids("labeler_id", "prompt_id")}


def _comparison(fields: Fields) -> Record:
    asked = prompt(fields)
    fields.not_both("responses", "chosen")
    if "chosen" in fields or "rejected" in fields:
        pair = [fields.take(name, str, "a string") for name in ("chosen", "rejected")]
        responses, ranks = pair, [1, 2]
    else:
        responses, ranks = _ranked_responses(fields)
    if not any(response.strip() for response in responses):
        raise fields.error("responses", "at least one response with text in it", "only empty ones", "drop the record")
    return {**asked, "responses": responses, "ranks": ranks, **fields.ids("labeler_id", "prompt_id")}


def _ranked_responses(fields: Fields) -> tuple[list[str], list[int]]:
    responses = fields.take("responses", list, "a list of strings")
    ranks = fields.take("ranks", list, "a list of whole numbers")
    for index, response in enumerate(responses):
        if not isinstance(response, str):
            raise fields.error(f"responses[{index}]", "a string", type_name(response))
    for index, rank in enumerate(ranks):
        if type(rank) is not int:
            raise fields.error(f"ranks[{index}]", "a whole number", type_name(rank))
        if not 1 <= rank <= _MAX_RANK:
            raise fields.error(f"ranks[{index}]", "a rank from 1 (best) on", "one out of range", "number them from 1")
    if len(responses) < 2:
        raise fields.error("responses", "at least 2 responses to compare", str(len(responses)))
    if len(ranks) != len(responses):
        raise fields.error("ranks", f"one rank for each of {len(responses)} responses", f"{len(ranks)} ranks")
    return responses, ranks


def _prompt(fields: Fields) -> Record:
    return {**prompt(fields), **fields.ids("prompt_id"), **fields.optional("use_case")}


def _rating(fields: Fields) -> Record:
    ids = {name: fields.identity(name) for name in ("output_id", "labeler_id")}
    likert = fields.take("likert", int, "a whole number from 1 to 7")
    if not 1 <= likert <= 7:
        raise fields.error("likert", "a whole number from 1 to 7", "one out of range")
    return {**ids, "likert": likert, "flags": fields.take("flags", dict, "an object")}


_PARSERS: dict[str, Callable[[Fields], Record]] = {
    "document": _document,
    "demonstration": _demonstration,
    "comparison": _comparison,
    "prompt": _prompt,
    "unpaired": _unpaired,
    "rating": _rating,
}
KINDS = tuple(_PARSERS)
PROMPTED = frozenset({"demonstration", "comparison", "prompt", "unpaired"})  # a prompt, or messages
