"""HH transcripts: turns after Human: and Assistant:, of which chosen and rejected share the first (Bai et al. 2022)."""

import re

from rlhfjax.data.fields import Fields
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Object
from rlhfjax.data.layouts.preferences import DIFFER
from rlhfjax.data.layouts.turns import Message

_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _is_transcript(text: object) -> bool:
    if not isinstance(text, str):
        return False
    marks = list(_MARK.finditer(text))
    return bool(marks) and marks[-1][1] == "Assistant" and not text[: marks[0].start()].strip()


def messages_of(transcript: str) -> list[Message]:
    """The turns of a transcript, without the white space around them."""
    marks = list(_MARK.finditer(transcript))
    ends = [mark.start() for mark in marks[1:]] + [len(transcript)]
    return [
        {"role": _ROLES[mark[1]], "content": transcript[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _compared(fields: Fields) -> list[Object]:
    pair = []
    for name in ("chosen", "rejected"):
        text = fields.take(name, str, "a string")
        if not _is_transcript(text):
            raise fields.error(name, "turns after Human: and Assistant:, the last one the assistant's", "another text")
        pair.append(messages_of(text))
    (*before, good), (*other, bad) = pair
    return [{"messages": before, "chosen": good["content"], "rejected": bad["content"]}] if before == other else []


LAYOUTS = (
    layout(
        "hh",
        "chosen, rejected",
        lambda obj: "prompt" not in obj and all(_is_transcript(obj.get(name)) for name in ("chosen", "rejected")),
        "comparison",
        _compared,
        "the turns after Human: and Assistant: → messages, the last answers → the two responses",
        DIFFER,
    ),
)
