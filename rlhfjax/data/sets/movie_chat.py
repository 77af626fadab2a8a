"""Conversations for pretraining, split so that nobody in validation speaks in training."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from rlhfjax.data.sets.movie_archives import Conversation
from rlhfjax.data.sets.movie_tasks import shuffled

_MIN_TURNS = 4
_VALIDATION_SHARE = 0.07
# What may identify or reach a person: web and mail addresses, telephone numbers of 7 or 10 digits.
_CONTACT = re.compile(
    r"https?://|www\.|\b\w+\.(?:com|org|net|edu)\b|\S@\S+\.\w|(?<!\d)(?:\(?\d{3}\)?[\s.-]?)?\d{3}[\s.-]?\d{4}(?!\d)",
    re.IGNORECASE,
)


def split_conversations(conversations: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """(train, validation): at least 4 turns, no contact data, no sender on both sides; mixed ones are dropped."""
    usable = [c for c in conversations if len(c.turns) >= _MIN_TURNS and not any(map(_CONTACT.search, c.turns))]
    chosen = _validation_senders(usable)
    train = [c for c in usable if chosen.isdisjoint(c.senders)]
    return train, [c for c in usable if chosen.issuperset(c.senders)]


def _validation_senders(conversations: Sequence[Conversation]) -> set[str]:
    """Senders who talk mostly among themselves, grown one by one until they hold the validation share.

    Most senders meet in one connected web around a few very active people, so senders drawn at random would mix with
    the rest in most of their conversations, and those would be lost.
    """
    met: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for conversation in conversations:
        for sender in conversation.senders:
            met[sender].update(other for other in conversation.senders if other != sender)
    waiting = shuffled(sorted(met), "chat")
    inside: Counter[str] = Counter()
    chosen: set[str] = set()
    held = 0
    while waiting and held < _VALIDATION_SHARE * len(conversations):
        best = max(waiting, key=lambda sender: (inside[sender] + 0.5) / (met[sender].total() + 0.5))
        waiting.remove(best)
        chosen.add(best)
        held += inside[best]
        inside.update(met[best])
    return chosen
