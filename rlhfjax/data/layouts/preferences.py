"""TRL's layouts: prompt, completion, chosen and rejected as texts or as lists of messages, the prompt apart or inside.

Source: TRL, "Dataset formats and types" (prompt-only, prompt-completion, preference and unpaired preference).
"""

from typing import Any

from rlhfjax.data.fields import Fields
from rlhfjax.data.labels import meaning, take_label
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Object
from rlhfjax.data.layouts.own import contains_prompt
from rlhfjax.data.layouts.turns import Message, answer_text, shared, tools, turns, with_system

DIFFER = "rows whose two conversations differ before their last answer"


def _asked(fields: Fields) -> list[Message]:
    """The messages of `prompt`, after the row's system prompt; none where the prompt lies elsewhere."""
    prompt = fields.pop("prompt")
    return with_system(fields, [] if prompt is None else turns(fields, "prompt", prompt, alone="user"))


def _prompt(fields: Fields) -> list[Object]:
    return [{"messages": _asked(fields), **tools(fields)}]


def _completed(fields: Fields) -> list[Object]:
    asked = _asked(fields)
    answer = turns(fields, "completion", fields.pop("completion"), alone="assistant")
    return [{"messages": [*asked, *answer], **tools(fields)}]


def _judged(fields: Fields) -> list[Object]:
    asked = _asked(fields)
    *before, answer = turns(fields, "completion", fields.pop("completion"), alone="assistant") or [{}]
    if before or not answer:
        raise fields.error("completion", "one answer", f"{len(before)} messages before it" if answer else "none")
    label = take_label(fields, "label")
    return [
        {
            "messages": asked,
            "completion": answer_text(fields, "completion", answer),
            "label": label,
            **tools(fields),
        }
    ]


def compared(fields: Fields, asked: list[Message], good: Any, bad: Any) -> list[Object]:
    """A comparison of two conversations, or of two answers to what was asked; none where they part too early.

    What was asked may be a part of what the two share, and is then not written twice.
    """
    pair = turns(fields, "chosen", good, alone="assistant"), turns(fields, "rejected", bad, alone="assistant")
    common = shared(*pair)
    if any(len(conversation) != common + 1 for conversation in pair):
        return []
    before = pair[0][:common]
    inside = bool(asked) and any(_same(asked[-1], message) for message in before)
    first = [message for message in asked if not (inside and any(_same(message, other) for other in before))]
    if not (first or before):
        raise fields.error("prompt", "a prompt, apart or in chosen and rejected", "answers alone")
    texts = {name: answer_text(fields, name, turn[-1]) for name, turn in zip(("chosen", "rejected"), pair, strict=True)}
    return [{"messages": [*first, *before], **texts, **tools(fields)}]


def _same(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and str(one["content"]).strip() == str(other["content"]).strip()


def _preferred(fields: Fields) -> list[Object]:
    row = _apart({name: fields.pop(name) for name in ("prompt", "chosen", "rejected")})
    if fields.left.get("messages") == row["chosen"]:
        fields.pop("messages")  # the better conversation once more
    fields.left["prompt"] = row["prompt"]
    return compared(fields, _asked(fields), row["chosen"], row["rejected"])


def _apart(row: Object) -> Object:
    """Texts without the prompt that both begin with. Where only some rows do, the others are left as they are."""
    if not contains_prompt(row):
        return row
    start = len(row["prompt"])
    return {"prompt": row["prompt"], "chosen": row["chosen"][start:], "rejected": row["rejected"][start:]}


def _without_prompt(fields: Fields) -> list[Object]:
    return [_apart({name: fields.take(name, str, "a string") for name in ("prompt", "chosen", "rejected")})]


def _common_beginning(fields: Fields) -> list[Object]:
    """Plain texts without a prompt: whole words that both begin with are the prompt, white space is the response's."""
    good, bad = (fields.take(name, str, "a string") for name in ("chosen", "rejected"))
    length = shared(good, bad)
    while length and not (good[length].isspace() and bad[length].isspace()):
        length -= 1
    while length and good[length - 1].isspace():
        length -= 1
    if not good[:length].strip():
        return []
    return [{"prompt": good[:length], "chosen": good[length:], "rejected": bad[length:]}]


def _messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _pair(obj: Object) -> bool:
    return all(obj.get(name) is not None for name in ("chosen", "rejected"))


def _conversational(obj: Object, *names: str) -> bool:
    """Whether a row of these fields has messages in one of them, or a system prompt beside texts."""
    given = [obj.get(name) for name in names]
    if any(value is None for value in given) or "conversations" in obj:
        return False
    return any(_messages(value) or isinstance(value, dict) for value in given) or bool(obj.get("system"))


LAYOUTS = (
    layout(
        "trl_unpaired",
        "prompt, completion, label",
        lambda obj: _conversational(obj, "prompt", "completion") and meaning(obj.get("label")) is not None,
        "unpaired",
        _judged,
        "prompt → messages, completion → completion, label → label",
    ),
    layout(
        "trl_preference",
        "prompt, chosen, rejected",
        lambda obj: _pair(obj) and _conversational(obj, "prompt", "chosen", "rejected"),
        "comparison",
        _preferred,
        "prompt (and what chosen and rejected share) → messages, the last answers → the two responses",
        DIFFER,
    ),
    layout(
        "trl_implicit_preference",
        "chosen, rejected",
        lambda obj: all(_messages(obj.get(name)) and len(obj[name]) > 1 for name in ("chosen", "rejected")),
        "comparison",
        _preferred,
        "what chosen and rejected share → messages, the last answers → the two responses",
        DIFFER,
    ),
    layout(
        "prompt_inside",
        "prompt, chosen, rejected",
        contains_prompt,
        "comparison",
        _without_prompt,
        "prompt → prompt, chosen and rejected → the two responses, without the prompt where both begin with it",
    ),
    layout(
        "implicit_preference",
        "chosen, rejected",
        lambda obj: "prompt" not in obj and all(isinstance(obj.get(name), str) for name in ("chosen", "rejected")),
        "comparison",
        _common_beginning,
        "the words that chosen and rejected share at the start → prompt, what follows → the two responses",
        "rows whose chosen and rejected share no word at the start",
    ),
    layout(
        "trl_prompt_completion",
        "prompt, completion",
        lambda obj: _conversational(obj, "prompt", "completion") and meaning(obj.get("label")) is None,
        "demonstration",
        _completed,
        "prompt + completion → messages",
    ),
    layout(
        "verl",
        "prompt, reward_model, data_source",
        lambda obj: _conversational(obj, "prompt") and isinstance(obj.get("reward_model"), dict),
        "prompt",
        _prompt,
        "prompt → messages; reward_model with its ground_truth is kept under extra",
    ),
    layout(
        "trl_prompt",
        "prompt",
        lambda obj: _conversational(obj, "prompt") and "completion" not in obj,
        "prompt",
        _prompt,
        "prompt → messages",
    ),
)
