"""Questions: with their answers (GSM8K and many others), with choices, with two answers, or of benchmarks alone."""

from functools import partial

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.instructions import answered, asked_alone, compared_after, has
from rlhfjax.data.layouts.layout import Layout, Object
from rlhfjax.data.layouts.turns import Message, with_system


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


def _choices_alone(fields: Fields) -> list[Object]:
    row = asked_alone(_question, fields)
    fields.pop("choices")
    return row


def _answer_to_question(fields: Fields) -> list[Object]:
    return answered(_question, _first(_ANSWERS, fields.left) or "answer", fields)


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
    return "question_id" in obj and has("text")(obj)


def _is_chosen(obj: Object) -> bool:
    return has("question")(obj) and "choices" in obj and ("answer" in obj or "answerKey" in obj)


LAYOUTS: tuple[Layout, ...] = (
    layout(
        "question_preference",
        "question, chosen, rejected",
        has("question", "chosen", "rejected"),
        "comparison",
        partial(compared_after, _question),
        "system + question → what is asked, chosen and rejected → the two responses",
    ),
    layout(
        "multiple_choice",
        "question, choices, answer",
        _is_chosen,
        "demonstration",
        _chosen,
        "question + lettered choices → what is asked, the letter and text of answer (or answerKey) → the answer",
        asked=_choices_alone,
    ),
    layout(
        "question_answer",
        "question, answer",
        lambda obj: bool(_first(_QUESTIONS, obj) and _first(_ANSWERS, obj)),
        "demonstration",
        _answer_to_question,
        f"system + {_either(_QUESTIONS)} → what is asked, {_either(_ANSWERS)} → the answer",
        asked=partial(asked_alone, _question),
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
