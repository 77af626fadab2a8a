"""Dialogue filters: which exchanges of a conversation are worth learning from, and a count of the reasons against.

The rules are those that DialoGPT's training data were made by (Zhang et al. 2020, section 3.1), applied to each
exchange, that is a message and its answer. A conversation is cut at an exchange that is rejected: what was before it
and what comes after it are conversations of their own, so that one bad line does not discard the rest.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhfjax.data.preparing import prepare_files
from rlhfjax.data.reading import RECOGNISE, Reading, read_records
from rlhfjax.errors import DataError

Message = Mapping[str, Any]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


# The fifty most frequent words of written English; an answer without one of them is mostly not English.
FREQUENT = frozenset(
    words(
        "the of and a to in is you that it he was for on are as with his they i at be this have from or one had by but "
        "not what all were we when your can said there use an each which she do how their if will my"
    )
)
# A short list; `blocklist` takes a longer one.
OFFENSIVE = frozenset(
    words(
        "fuck fucking fucked fucker motherfucker shit shitty bullshit bitch bitches cunt asshole dick pussy slut whore "
        "bastard nigger nigga faggot fag retard retarded rape"
    )
)
KEPT = "kept"
_URL = re.compile(r"https?://|www\.|\b[\w-]+\.(?:com|org|net|edu|io|gov)\b", re.IGNORECASE)


@dataclass(frozen=True)
class DialogueFilter:
    """The seven rules. `common` are trigrams so frequent that an answer made of them says nothing (see `of`)."""

    common: frozenset[tuple[str, ...]] = frozenset()
    blocklist: frozenset[str] = OFFENSIVE
    max_words: int = 200
    bland_share: float = 0.9

    @classmethod
    def of(cls, answers: Iterable[str], seen: int = 1000, **settings: Any) -> "DialogueFilter":
        """A filter for a corpus with these answers: trigrams that occur more than `seen` times in it are common."""
        counts = Counter(trigram for answer in answers for trigram in _trigrams(answer))
        return cls(common=frozenset(trigram for trigram, count in counts.items() if count > seen), **settings)

    def reason(self, message: str, answer: str) -> str | None:
        """Why an exchange is rejected, or None: the first rule that it breaks, in the order of the paper."""
        said, both = words(answer), f"{message} {answer}"
        if _URL.search(both):
            return "a web address"
        if any(first == second == third for first, second, third in zip(said, said[1:], said[2:], strict=False)):
            return "a word three times in a row"
        if FREQUENT.isdisjoint(said):
            return "none of the fifty most frequent words"
        if "[" in answer or "]" in answer:
            return "a bracket (markup)"
        if len(words(both)) > self.max_words:
            return f"more than {self.max_words} words"
        if not self.blocklist.isdisjoint(words(both)):
            return "an offensive word"
        trigrams = _trigrams(answer)
        if trigrams and sum(t in self.common for t in trigrams) >= self.bland_share * len(trigrams):
            return "nothing but common phrases"
        return None


def filtered_sessions(
    messages: Sequence[Message], rules: DialogueFilter, rejected: Counter[str], max_messages: int | None = None
) -> Iterator[list[Message]]:
    """The pieces of a conversation without rejected exchanges, each with an answer, of at most `max_messages` messages.

    Reasons are counted in `rejected`. A system message that opens the conversation opens every piece.
    """
    opening = [messages[0]] if messages and messages[0]["role"] in ("system", "developer") else []
    turns = messages[len(opening) :]
    bad = []
    for place, (before, after) in enumerate(pairwise(turns)):
        if after["role"] != "assistant" or after.get("tool_calls"):
            continue  # a call of a tool is no answer to judge
        if reason := rules.reason(before["content"], after["content"]):
            rejected[reason] += 1
            bad.append(place)
    start = 0
    for end in [*bad, len(turns)]:  # an exchange at `end` and `end + 1` is left out
        yield from _pieces(opening, turns[start:end], max_messages)
        start = end + 2


def _pieces(opening: list[Message], turns: Sequence[Message], max_messages: int | None) -> Iterator[list[Message]]:
    while turns and turns[0]["role"] in ("assistant", "tool"):
        turns = turns[1:]  # it answers something that was left out
    size = len(turns) if max_messages is None else max(2, (max_messages - len(opening)) // 2 * 2)
    for start in range(0, len(turns), size or 1):
        piece = list(turns[start : start + size])
        while piece and piece[-1]["role"] != "assistant":
            piece.pop()  # nobody answered it
        if piece:
            yield [*opening, *piece]


def rejection_report(counts: Mapping[str, int]) -> str:
    """How many exchanges were kept, and one line a reason against the others, the most frequent first."""
    total = max(sum(counts.values()), 1)
    lines = [f"{counts.get(KEPT, 0):,} of {total:,} exchanges kept"]
    against = sorted((item for item in counts.items() if item[0] != KEPT), key=lambda item: (-item[1], item[0]))
    return "\n".join([*lines, *(f"{count:>9,}  {count / total:6.2%}  {reason}" for reason, count in against)])


def filtered_records(
    records: Iterable[Mapping[str, Any]], rules: DialogueFilter, rejected: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Demonstrations without rejected exchanges, cut where one was; {"prompt", "completion"} is one exchange."""
    for record in records:
        if record.get("messages") is None:
            if reason := rules.reason(record["prompt"], record["completion"]):
                rejected[reason] += 1
            else:
                rejected[KEPT] += 1
                yield dict(record)
            continue
        for piece in filtered_sessions(record["messages"], rules, rejected):
            rejected[KEPT] += count_exchanges(piece)
            yield {**record, "messages": piece}


def answers(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every answer in demonstrations."""
    for record in records:
        if record.get("messages") is None:
            yield record["completion"]
        else:
            yield from (message["content"] for message in record["messages"] if message["role"] == "assistant")


def prepare_filtered(
    paths: Mapping[str, Sequence[Path]],
    name: str,
    data_dir: Path,
    blocklist: Path | None = None,
    reading: Reading = RECOGNISE,
) -> tuple[Path, str]:
    """Prepares files of demonstrations as the dataset `name` through the filters: its folder, and a report.

    Raises DataError where a file is wrong (as `prepare_files`), where all of a split is rejected, or for the blocklist.
    """
    offensive = OFFENSIVE if blocklist is None else _listed(blocklist)

    def read(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for path in files:
            yield from read_records(path, "demonstration", reading)

    rules = DialogueFilter.of(
        (answer for files in paths.values() for answer in answers(read(files))), blocklist=offensive
    )
    counts: Counter[str] = Counter()
    for split, files in paths.items():
        if not sum(1 for _ in filtered_records(read(files), rules, counts)):
            report = rejection_report(counts)
            raise DataError(f"{split}: expected an exchange that passes the filters, got none; {report}")
    digest = hashlib.sha256(json.dumps(sorted(offensive)).encode()).hexdigest()
    edit = partial(filtered_records, rules=rules, rejected=Counter())
    said = f"dialogue filters {digest[:12]}"
    return prepare_files(paths, "demonstration", name, data_dir, edit, said, reading), rejection_report(counts)


def _listed(blocklist: Path) -> frozenset[str]:
    try:
        return frozenset(line.strip().lower() for line in blocklist.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{blocklist}: expected a text file with one word per line, got {error}") from None


def count_exchanges(messages: Sequence[Message]) -> int:
    """Answers in a conversation that answer something."""
    return sum(
        after["role"] == "assistant" and not after.get("tool_calls") and before["role"] not in ("system", "developer")
        for before, after in pairwise(messages)
    )


def _trigrams(text: str) -> list[tuple[str, ...]]:
    said = words(text)
    return list(zip(said, said[1:], said[2:], strict=False))
