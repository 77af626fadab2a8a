"""Tokens as a client reads them: text, bytes, log-probability and the likeliest others in their place."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from rlhfjax.text.loading import AnyTokenizer

_LOWEST = -9999.0  # what JSON has in the place of -inf
_UNKNOWN = "\ufffd"


@dataclass(frozen=True)
class Spelt:
    """An id as text: what is shown for it, its bytes, and how many characters it adds to a text."""

    shown: str
    bytes: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Token:
    """One token of a text with its log-probability in nats (None for the first of a prompt), and the likeliest."""

    spelt: Spelt
    log_prob: float | None
    top: tuple[tuple[Spelt, float], ...] = ()

    @property
    def length(self) -> int:
        return self.spelt.length


def token_of(
    tokenizer: AnyTokenizer | None, token: int, before: int | None, log_prob: float | None, top: Mapping[int, float]
) -> Token:
    """An id that follows `before`, with its log-probability and those of the likeliest ids in its place."""
    others = tuple((spelt(tokenizer, other, before), finite(value)) for other, value in top.items())
    return Token(spelt(tokenizer, token, before), None if log_prob is None else finite(log_prob), others)


def finite(value: float) -> float:
    """A log-probability that JSON can write."""
    return max(value, _LOWEST)


@lru_cache(maxsize=2**16)
def spelt(tokenizer: AnyTokenizer | None, token: int, before: int | None) -> Spelt:
    """An id as text after the id `before`. Bytes that are no character are shown as OpenAI shows them."""
    if tokenizer is None:
        return Spelt(str(token), (), 0)
    text = tokenizer.decode_continuation([token], before)
    if not text:  # a special token: it has a name, and no text
        return Spelt(tokenizer.pieces([token])[0], (), 0)
    if _UNKNOWN not in text:
        return Spelt(text, tuple(text.encode()), len(text))
    raw = _bytes_of(tokenizer.pieces([token])[0])
    if raw is None:
        return Spelt(text, tuple(text.encode()), len(text))
    return Spelt("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw), len(text))


def _bytes_of(piece: str) -> bytes | None:
    """The bytes that a piece of a vocabulary stands for: <0xE2>, or letters of the alphabet of byte-level BPE."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    alphabet = _byte_level()
    return bytes(alphabet[letter] for letter in piece) if all(letter in alphabet for letter in piece) else None


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """The letters that stand for bytes (Radford et al. 2019): printable ones for themselves, others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
