"""The letter U+2581, which SentencePiece writes for a space: in a text it is spelled in bytes, or it would become one.

The vocabulary takes the letter for a space wherever it stands. So another letter, which is neither in the text nor in
the vocabulary, is tokenised in its place, and of its bytes those of U+2581 are made. No pair ever joins bytes.
"""

from typing import NamedTuple

import tokenizers

from rlhfjax.text.sentencepiece_json import SPACE

_STAND_INS = range(0xF0000, 0xFFFFE)  # code points for private use


class Spelling(NamedTuple):
    """The id of each byte, in a vocabulary that writes a space with U+2581."""

    ids: tuple[int, ...]

    def of(self, letter: str) -> list[int]:
        return [self.ids[byte] for byte in letter.encode()]


def spelling(tokenizer: tokenizers.Tokenizer) -> Spelling | None:
    """How U+2581 can be spelled; None where it comes back as it is, and where the vocabulary has no bytes."""
    if SPACE in tokenizer.decode(tokenizer.encode(f"a{SPACE}a", add_special_tokens=False).ids):
        return None
    ids = tuple(tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return None if None in ids else Spelling(tuple(index for index in ids if index is not None))


def encode(tokenizer: tokenizers.Tokenizer, text: str, spelled: Spelling | None) -> list[int]:
    """Ids of a text without special tokens, U+2581 spelled in bytes if it can be."""
    if spelled is None or SPACE not in text:
        return tokenizer.encode(text, add_special_tokens=False).ids
    free = (chr(code) for code in _STAND_INS if chr(code) not in text)
    stand_in = next(letter for letter in free if tokenizer.token_to_id(letter) is None)
    ids = tokenizer.encode(text.replace(SPACE, stand_in), add_special_tokens=False).ids
    return _replace(ids, spelled.of(stand_in), spelled.of(SPACE))


def _replace(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    made, place = [], 0
    while place < len(ids):
        found = ids[place : place + len(old)] == old
        made += new if found else ids[place : place + 1]
        place += len(old) if found else 1
    return made
