"""Instructions and questions with their answers: alpaca, dolly, self-instruct, GSM8K and their kin.

They are read as messages, so that what is asked and what is answered stand apart in every model's own way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.labels import meaning, take_label
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Layout, Object
from rlhfjax.data.layouts.turns import Message, tools, with_system

_Ask = Callable[[Fields], list[Message]]


def _has(*names: str) -> Callable[[Object], bool]:
    return lambda obj: all(isinstance(obj.get(name), str) for name in names)


def _instruction(about: str, fields: Fields) -> list[Message]:
    """The instruction, a line below it what it is about (if anything), after what was said before."""
    parts = [fields.text("instruction")]
    if about in fields:
        parts.append(fields.take(about, str, "a string"))
    asked = {"role": "user", "content": "\n".join(part for part in parts if part.strip())}
    return with_system(fields, [*_history(fields), asked])


def _history(fields: Fields) -> list[Message]:
    messages = []
    for index, pair in enumerate(fields.take("history", list, "a list of pairs") if "history" in fields else []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise fields.error(f"history[{index}]", "a pair of texts, asked and answered", type_name(pair))
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _answered(ask: _Ask, answer: str, fields: Fields) -> list[Object]:
    messages = ask(fields)
    said = {"role": "assistant", "content": fields.text(answer)}
    return [{"messages": [*messages, said], **tools(fields)}]


def _compared(ask: _Ask, fields: Fields) -> list[Object]:
    messages = ask(fields)
    pair = {name: fields.take(name, str, "a string") for name in ("chosen", "rejected")}
    return [{"messages": messages, **pair, **tools(fields)}]


def _judged(ask: _Ask, answer: str, label: str, fields: Fields) -> list[Object]:
    messages = ask(fields)
    given: dict[str, Any] = {"completion": fields.text(answer), "label": take_label(fields, label)}
    return [{"messages": messages, **given, **tools(fields)}]


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


_QUESTIONS = ("question", "problem", "query", "prompt", "input")
_ANSWERS = ("solution", "response", "answer", "output")


def _first(names: tuple[str, ...], obj: Object) -> str:
    """The first of these fields that holds text; the empty string where none does."""
    return next((name for name in names if isinstance(obj.get(name), str)), "")


def _question(fields: Fields) -> list[Message]:
    """The question, and below it its lettered choices, if there are any."""
    asked = fields.text(_first(_QUESTIONS, fields.left) or "question")
    lines = [asked, *(f"{letter}. {text}" for letter, text in _choices(fields).items())]
    return with_system(fields, [{"role": "user", "content": "\n".join(lines)}])


def _choices(fields: Fields) -> dict[str, str]:
    """Texts by letter, from a list of texts or from {text, label} as ARC has them."""
    given = fields.left.get("choices")
    labels, texts = (given.get("label"), given.get("text")) if isinstance(given, dict) else (None, given)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return {}
    letters = labels if isinstance(labels, list) else [chr(ord("A") + place) for place in range(len(texts))]
    return dict(zip(map(str, letters), texts, strict=False))


def _chosen(fields: Fields) -> list[Object]:
    """A question with choices; the answer is the letter, or the number of the choice from 0, of the right one."""
    choices = _choices(fields)
    messages = _question(fields)
    fields.pop("choices")
    name = "answerKey" if "answerKey" in fields else "answer"
    answer = fields.pop(name)
    letter = list(choices)[answer] if type(answer) is int and 0 <= answer < len(choices) else str(answer)
    if letter not in choices:
        raise fields.error(name, f"one of the choices {', '.join(choices)}, or its number from 0", type_name(answer))
    return [{"messages": [*messages, {"role": "assistant", "content": f"{letter}. {choices[letter]}"}]}]


def _answer_to_question(fields: Fields) -> list[Object]:
    return _answered(_question, _first(_ANSWERS, fields.left) or "answer", fields)


def _seed_task(fields: Fields) -> list[Object]:
    """One demonstration for every instance of a task (Wang et al. 2023, self-instruct)."""
    instruction = fields.text("instruction")
    rows = []
    for index, instance in enumerate(fields.take("instances", list, "a list of instances")):
        where = f"{fields.where}: instances[{index}]"
        if not isinstance(instance, dict):
            raise fields.error(f"instances[{index}]", "an object with input and output", type_name(instance))
        given = Fields(fields.kind, {**instance, "instruction": instruction}, where)
        rows += _answered(partial(_instruction, "input"), "output", given)
    return rows


def _first_turn(fields: Fields) -> list[Object]:
    """The first question; what is asked afterwards needs the answer and stays beside."""
    asked = fields.left.get("turns")
    if not isinstance(asked, list) or not asked or not isinstance(asked[0], str):
        raise fields.error("turns", "a list that begins with a question", type_name(asked))
    return [{"messages": [{"role": "user", "content": asked[0]}], **_question_id(fields)}]


def _numbered_question(fields: Fields) -> list[Object]:
    return [{"messages": [{"role": "user", "content": fields.text("text")}], **_question_id(fields)}]


def _question_id(fields: Fields) -> Object:
    return {"prompt_id": fields.identity("question_id")} if "question_id" in fields else {}


def _has_question_text(obj: Object) -> bool:
    return "question_id" in obj and _has("text")(obj)


def _is_chosen(obj: Object) -> bool:
    return _has("question")(obj) and "choices" in obj and ("answer" in obj or "answerKey" in obj)


_alpaca = partial(_instruction, "input")
_ALPACA = "system + history + instruction + input → the conversation before the answer"
LAYOUTS: tuple[Layout, ...] = (
    layout(
        "alpaca_kto",
        "instruction, input, output, kto_tag",
        lambda obj: _has("instruction", "output")(obj) and meaning(obj.get("kto_tag")) is not None,
        "unpaired",
        partial(_judged, _alpaca, "output", "kto_tag"),
        f"{_ALPACA}, output → completion, kto_tag → label",
    ),
    layout(
        "alpaca_preference",
        "instruction, input, chosen, rejected",
        _has("instruction", "chosen", "rejected"),
        "comparison",
        partial(_compared, _alpaca),
        f"{_ALPACA}, chosen and rejected → the two responses",
    ),
    layout(
        "alpaca",
        "instruction, input, output",
        _has("instruction", "output"),
        "demonstration",
        partial(_answered, _alpaca, "output"),
        f"{_ALPACA}, output → the answer",
    ),
    layout(
        "dolly",
        "instruction, context, response",
        _has("instruction", "response"),
        "demonstration",
        partial(_answered, partial(_instruction, "context"), "response"),
        "system + instruction + context → what is asked, response → the answer",
    ),
    layout(
        "self_instruct",
        "instruction, instances",
        lambda obj: _has("instruction")(obj) and isinstance(obj.get("instances"), list),
        "demonstration",
        _seed_task,
        "instruction + each instance's input → what is asked, its output → the answer",
    ),
    layout(
        "question_preference",
        "question, chosen, rejected",
        _has("question", "chosen", "rejected"),
        "comparison",
        partial(_compared, _question),
        "system + question → what is asked, chosen and rejected → the two responses",
    ),
    layout(
        "multiple_choice",
        "question, choices, answer",
        _is_chosen,
        "demonstration",
        _chosen,
        "question + lettered choices → what is asked, the letter and text of answer (or answerKey) → the answer",
    ),
    layout(
        "question_answer",
        "question, answer",
        lambda obj: bool(_first(_QUESTIONS, obj) and _first(_ANSWERS, obj)),
        "demonstration",
        _answer_to_question,
        f"system + {_either(_QUESTIONS)} → what is asked, {_either(_ANSWERS)} → the answer",
    ),
    layout(
        "mt_bench",
        "question_id, turns",
        lambda obj: isinstance(obj.get("turns"), list),
        "prompt",
        _first_turn,
        "the first of turns → messages, question_id → prompt_id; later turns and reference are kept under extra",
    ),
    layout(
        "vicuna",
        "question_id, text",
        _has_question_text,
        "prompt",
        _numbered_question,
        "text → messages, question_id → prompt_id",
    ),
)
