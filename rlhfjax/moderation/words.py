"""Texts as words that can be compared: one form for letters that look alike, and each word's place in its text.

Every character is read by itself (NFKD, without marks, in lower case), so that a text which comes in pieces gives the
words of the whole. What cannot be seen inside a word (marks, joiners, soft hyphens, apostrophes) is not there.
"""

import itertools
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

LONGEST = 128  # characters of a word; what goes on is another one, so that a text without spaces is not kept for ever
_RUN = 3  # so many single letters in a row are one word that was spelled out
_STRETCHES = 4  # of a letter many times in one word
_WORDS = ("a", "i")
_LEET = str.maketrans("034579@$", "oeastgas")
_ONES = ("i", "l")  # what a 1 stands for
# Pairs of a letter and the one it is taken for: Greek capitals, Cyrillic, Greek, Armenian, small capitals, strokes.
_PAIRS = (
    "ΑaΒbΕeΖzΗhΙiΚkΜmΝnΟoΡpΤtΥyΧx" + "аaвbеeкkмmнhоoрpсcтtуyхxіiјjѕsԁdһhԛqԝwьbѵvӏlгr" + "αaβbεeηnιiκkνvοoρpτtυuχxωwγyμu"
    "օoսuհhոn" + "ᴀaʙbᴄcᴅdᴇeɢgʜhɪiᴊjᴋkʟlᴍmɴnᴏoᴘpʀrᴛtᴜuᴠvᴡwʏyᴢz" + "ɑaɡgıiɩiʋvøołlđdħhŧtǀl"
)
_BOXES = (0x1F150, 0x1F170, 0x1F1E6)  # where the letters A to Z in discs, squares and flags begin
_LOOK_ALIKE = dict(zip(map(ord, _PAIRS[::2]), _PAIRS[1::2], strict=True)) | {
    first + place: chr(ord("a") + place) for first in _BOXES for place in range(26)
}
_UNSEEN = {"\u115f", "\u1160", "\u3164", "\uffa0", "'", "\u2019", "\u02bc", "\uff07", "`", "\u00b4"}
_DROPPED = ("Mn", "Me", "Cf")


class Word(NamedTuple):
    """A word by all the ways to read it, and its characters start to end (exclusive) in the text."""

    forms: tuple[str, ...]
    start: int
    end: int


@lru_cache(maxsize=1 << 14)
def _letters(character: str) -> str:
    """What a character is compared as: letters and digits, a space for what parts words, nothing for what is unseen."""
    if character in _UNSEEN:
        return ""
    found = ""
    for part in unicodedata.normalize("NFKD", character):
        if part in _UNSEEN or unicodedata.category(part) in _DROPPED:
            continue
        part = part.translate(_LOOK_ALIKE).casefold().translate(_LOOK_ALIKE)
        found += part if part.isalnum() or part in "@$" else " "
    return found


def _stands_alone(letter: str) -> bool:
    """Whether a letter is of a script that writes no spaces between words: Chinese, or Japanese."""
    return "\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff" or "\U00020000" <= letter <= "\U0003ffff"


def words_of(text: str) -> tuple[list[Word], int]:
    """The words of a text, and how many of them nothing that follows the text can change.

    Letters that stand by themselves, three or more in a row, are one word: `b u l l y`.
    """
    found: list[tuple[str, int, int]] = []
    word, start, end = "", 0, 0

    def close() -> None:
        nonlocal word
        if word:
            found.append((word, start, end))
        word = ""

    for place, character in enumerate(text):
        letters = _letters(character)
        if not letters and word:
            end = place + 1
        for letter in letters:
            if letter == " " or len(word) == LONGEST or _stands_alone(letter):
                close()
            if letter != " ":
                start = start if word else place
                word, end = word + letter, place + 1
            if _stands_alone(letter):
                close()
    whole = len(found)
    close()
    return _spelled_out(found, whole)


def _spelled_out(found: list[tuple[str, int, int]], whole: int) -> tuple[list[Word], int]:
    """Joins letters that stand by themselves; `whole` of the words have an end in the text."""
    words: list[Word] = []
    settled, place = 0, 0
    while place < len(found):
        stop = place
        while stop < len(found) and len(found[stop][0]) == 1 and not _stands_alone(found[stop][0]):
            stop += 1
        if stop - place >= _RUN:
            words += _spelled("".join(letter for letter, _, _ in found[place:stop]), found[place], found[stop - 1])
        else:
            stop = max(stop, place + 1)
            words += [Word(_forms(word), start, end) for word, start, end in found[place:stop]]
        alone = len(found[stop - 1][0]) == 1 and not _stands_alone(found[stop - 1][0])
        # A run of letters at the end may go on; one before a longer word may not.
        if stop <= whole and not (alone and stop == len(found)):
            settled = len(words)
        place = stop
    return words, settled


def _spelled(letters: str, first: tuple[str, int, int], last: tuple[str, int, int]) -> list[Word]:
    """Letters in a row as a word; an `a` or `i` before or after the others may be a word of its own."""
    forms, words = _forms(letters), []
    if letters[0] in _WORDS and len(letters) > _RUN:
        words.append(Word((letters[0],), first[1], first[2]))
        forms = (*_forms(letters[1:]), *forms)
    if letters[-1] in _WORDS:
        forms = (*forms, *(form[:-1] for form in forms))
    # It begins where all of them do, so that what is read again from its start is read alike.
    return [*words, Word(tuple(dict.fromkeys(forms)), first[1], last[2])]


@lru_cache(maxsize=1 << 14)
def _forms(word: str) -> tuple[str, ...]:
    """All readings of a word: as it is, digits as letters, and letters that come three times or more as one or two."""
    plain = word.replace("@", "").replace("$", "")
    read = [plain]
    if any(letter.isalpha() for letter in plain) or "@" in word or "$" in word:
        read += [word.translate(_LEET).replace("1", one) for one in _ONES]
    read += [shorter for each in tuple(read) for shorter in _shorter(each)]
    return tuple(dict.fromkeys(each for each in read if each))


def _shorter(word: str) -> list[str]:
    """The word with each stretch of one letter, of three or more, as one of it or as two."""
    parts = re.split(r"((.)\2{2,})", word)  # what lies between, a stretch, its letter, what lies between …
    if len(parts) > 3 * _STRETCHES + 1 or len(parts) == 1:
        return []
    stretches = [(letter, 2 * letter) for letter in parts[2::3]]
    return [
        "".join(itertools.chain(*zip(parts[::3], (*chosen, ""), strict=True)))
        for chosen in itertools.product(*stretches)
    ]
