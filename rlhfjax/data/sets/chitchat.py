"""Conversations between people as demonstrations and prompts for a chat model, through the dialogue filters.

The source is the one that the movies benchmark takes its pretraining text from. Who speaks first is the user, the other
the assistant; a conversation is cut where an exchange is rejected, and every `MAX_MESSAGES` messages.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rlhfjax.data.dialogue import DialogueFilter, filtered_sessions
from rlhfjax.data.sets.benchmark import Benchmark, Tables, configs_of
from rlhfjax.data.sets.movie_archives import CHAT_WHEEL, Conversation, read_conversations
from rlhfjax.data.sets.movie_chat import split_conversations
from rlhfjax.fetch import PinnedFile

KINDS = {"sessions": "demonstration", "prompts": "prompt"}
MAX_MESSAGES = 8


class Chitchat(Benchmark):
    """TFDS builder `chitchat`, one config per dataset."""

    name = "chitchat"
    KINDS: ClassVar = KINDS
    BUILDER_CONFIGS: ClassVar = configs_of(KINDS)

    @classmethod
    def sources(cls) -> tuple[PinnedFile, ...]:
        """The conversations."""
        return (CHAT_WHEEL,)

    @classmethod
    def compute(cls, *paths: Path) -> Tables:
        """Sessions, and prompts that end where the last answer of a session begins; nobody speaks in both splits."""
        train, validation = map(_between_two, split_conversations(read_conversations(paths[0])))
        rules = DialogueFilter.of(answer for chat in train for answer in chat.turns[1::2])
        return {
            "sessions": {
                "train": partial(_sessions, train, rules),
                "validation": partial(_sessions, validation, rules),
            },
            "prompts": {"train": partial(_prompts, train, rules), "test": partial(_prompts, validation, rules)},
        }


def _between_two(conversations: Sequence[Conversation]) -> list[Conversation]:
    return [chat for chat in conversations if len(chat.senders) == 2]


def _sessions(conversations: Sequence[Conversation], rules: DialogueFilter) -> Iterator[dict[str, Any]]:
    for chat in conversations:
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(chat.turns)]
        for piece in filtered_sessions(messages, rules, Counter(), MAX_MESSAGES):
            yield {"messages": piece}


def _prompts(conversations: Sequence[Conversation], rules: DialogueFilter) -> Iterator[dict[str, Any]]:
    for session in _sessions(conversations, rules):
        last = max(place for place, message in enumerate(session["messages"]) if message["role"] == "assistant")
        yield {"messages": session["messages"][:last]}
