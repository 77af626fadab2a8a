"""Exports of labelling tools: Argilla's records, and Label Studio's tasks with annotations.

Sources: Argilla, "Record" and "Response" (fields; responses by question, or by user with values); Label Studio, "Export
annotations" and the tags Pairwise and Chat (data; annotations with results). Who annotated becomes `labeler_id`.
"""

import re
from collections.abc import Iterator
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Object
from rlhfjax.data.layouts.scored import ranks_of
from rlhfjax.data.layouts.turns import Message, to_last_answer, turns

_PROMPTS = ("prompt", "instruction", "question", "request", "query", "input", "messages", "conversation", "chat")
_DONE = (None, "submitted")


def _asked(fields: Fields, name: str, given: Object) -> list[Message]:
    """The messages of the field that says what was asked, taken from `given`."""
    key = next((key for key in _PROMPTS if given.get(key)), None)
    if key is None:
        raise fields.error(name, f"what was asked, in one of {', '.join(_PROMPTS)}", f"the fields {', '.join(given)}")
    return turns(fields, f"{name}.{key}", given.pop(key), alone="user")


def _plain(name: Any) -> str:
    """A name without what people write differently in a field and in the question about it: response-1, response_1."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def _argilla(fields: Fields) -> list[Object]:
    """One comparison for every user who ranked or rated the responses, or chose one of them."""
    given = dict(fields.take("fields", dict, "an object of fields"))
    messages = _asked(fields, "fields", given)
    names = {_plain(name): name for name, text in given.items() if isinstance(text, str)}
    rows, compared = [], set()
    for user, answers in _by_user(fields.pop("responses")).items():
        ranks = _ranking(answers, set(names)) or _ratings(answers, set(names))
        if len(ranks) > 1:
            labeler = {"labeler_id": user} if user else {}
            responses = [given[names[name]] for name in ranks]
            rows.append({"messages": messages, "responses": responses, "ranks": list(ranks.values()), **labeler})
            compared |= {names[name] for name in ranks}
    fields.left |= {name: value for name, value in given.items() if name not in compared}
    return rows


def _by_user(responses: Any) -> dict[str, dict[str, Any]]:
    """Each user's submitted answers by question."""
    answers: dict[str, dict[str, Any]] = {}
    given = _by_question(responses) if isinstance(responses, dict) else _listed(responses or [])
    for user, question, value in given:
        answers.setdefault("" if user is None else str(user), {})[question] = value
    return answers


def _by_question(responses: dict[str, Any]) -> Iterator[tuple[Any, str, Any]]:
    for question, given in responses.items():
        for response in given if isinstance(given, list) else []:
            if isinstance(response, dict) and response.get("status") in _DONE:
                yield response.get("user_id"), question, response.get("value")


def _listed(responses: list[Any]) -> Iterator[tuple[Any, str, Any]]:
    for response in responses:
        if isinstance(response, dict) and response.get("status") in _DONE:
            values = response.get("values")
            for question, value in values.items() if isinstance(values, dict) else []:
                yield response.get("user_id"), question, value.get("value") if isinstance(value, dict) else value


def _ranking(answers: dict[str, Any], names: set[str]) -> dict[str, int]:
    """Ranks from a question whose value names the responses: an order, ranks beside the names, or the best alone."""
    for value in answers.values():
        if isinstance(value, str) and _plain(value) in names:
            alike = [name for name in sorted(names) if name.rstrip("0123456789") == _plain(value).rstrip("0123456789")]
            return {name: 1 if name == _plain(value) else 2 for name in alike}
        if isinstance(value, list) and value:
            named = [item if isinstance(item, dict) else {"value": item} for item in value]
            order = {_plain(item.get("value")): item.get("rank") or place for place, item in enumerate(named, 1)}
            if set(order) <= names:
                return order
    return {}


def _ratings(answers: dict[str, Any], names: set[str]) -> dict[str, int]:
    """Ranks from one rating per response, told by the number that the names of question and response end with."""
    scores = {}
    for question, value in answers.items():
        number = re.search(r"\d+$", question)
        named = [name for name in sorted(names) if number and re.search(rf"\D{number[0]}$", name)]
        if type(value) in (int, float) and len(named) == 1:
            scores[named[0]] = value
    return dict(zip(scores, ranks_of(list(scores.values())), strict=True))


def _annotations(fields: Fields) -> Iterator[tuple[Object, list[Object]]]:
    """Who made each annotation that was not cancelled, as a record's field, and its results."""
    for index, annotation in enumerate(fields.take("annotations", list, "a list of annotations")):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            raise fields.error(f"annotations[{index}]", "an object with a list of results", type_name(annotation))
        by = annotation.get("completed_by")
        by = by.get("id", by.get("email")) if isinstance(by, dict) else by
        labeler = {} if by is None else {"labeler_id": str(by)}
        if not annotation.get("was_cancelled"):
            yield labeler, [result for result in annotation["result"] if isinstance(result, dict)]


def _pairwise(fields: Fields) -> list[Object]:
    """One comparison for every annotation that selected the left or the right of two texts."""
    data = dict(fields.take("data", dict, "an object of the task's data"))
    messages = _asked(fields, "data", data)
    rows = []
    for labeler, results in _annotations(fields):
        for result in results:
            if result.get("type") == "pairwise":
                pair = _sides(fields, data, str(result.get("to_name", "")).split(","))
                value = result.get("value")
                selected = value.get("selected") if isinstance(value, dict) else None
                if selected not in ("left", "right"):
                    raise fields.error("annotations", "a selected side, left or right", repr(selected)[:40])
                ranks = [1, 2] if selected == "left" else [2, 1]
                rows.append({"messages": messages, "responses": pair, "ranks": ranks, **labeler})
    return rows


def _sides(fields: Fields, data: Object, names: list[str]) -> list[str]:
    """The two texts: those that the control names, else the only two texts beside what was asked."""
    texts = {name: text for name, text in data.items() if isinstance(text, str)}
    pair = names if set(names) <= set(texts) else list(texts)
    if len(pair) != 2:
        raise fields.error("data", f"two texts, named {' and '.join(names)}", f"the texts {', '.join(texts) or 'none'}")
    return [texts[name] for name in pair]


def _chats(fields: Fields) -> list[Object]:
    """The task's conversation with what each annotator wrote after it; alone, where nobody wrote anything."""
    data = fields.take("data", dict, "an object of the task's data")
    key = next((key for key, value in data.items() if _is_chat(value)), "")
    begun = turns(fields, f"data.{key}", data.get(key))
    written = []
    for labeler, results in _annotations(fields):
        values = [result.get("value") for result in results if result.get("type") == "chatmessage"]
        said = [value.get("chatmessage") if isinstance(value, dict) else value for value in values]
        if said:
            new = [{"role": turn["role"], "content": turn["content"]} for turn in turns(fields, "annotations", said)]
            written.append({"messages": [*begun, *new], **labeler})
    rows = written or [{"messages": begun}]
    return [{**row, "messages": to_last_answer(fields, "data", row["messages"])} for row in rows]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "author" in item or "from" in item) for item in value
    )


def _is_task(obj: Object, *types: str) -> bool:
    annotations = obj.get("annotations")
    if not isinstance(obj.get("data"), dict) or not isinstance(annotations, list):
        return False
    lists = [annotation.get("result") for annotation in annotations if isinstance(annotation, dict)]
    results = [result for given in lists if isinstance(given, list) for result in given if isinstance(result, dict)]
    return not types or any(result.get("type") in types for result in results)


LAYOUTS = (
    layout(
        "argilla",
        "fields, responses",
        lambda obj: isinstance(obj.get("fields"), dict) and isinstance(obj.get("responses"), (dict, list)),
        "comparison",
        _argilla,
        "fields (prompt or instruction) → messages, the other fields that a user ranked, rated or chose from → "
        "responses, user_id → labeler_id",
        "records that nobody has ranked",
    ),
    layout(
        "label_studio",
        "data, annotations",
        lambda obj: _is_task(obj, "pairwise"),
        "comparison",
        _pairwise,
        "data (prompt) → messages, the two texts → responses, the selected one → the better one, completed_by → "
        "labeler_id",
        "tasks without an annotation",
    ),
    layout(
        "label_studio_chat",
        "data, annotations",
        lambda obj: _is_task(obj) and any(_is_chat(value) for value in obj["data"].values()),
        "demonstration",
        _chats,
        "the conversation in data + the messages that were written → messages, to the last answer",
    ),
)
