"""The parts of a text that a tokenizer does not keep, in words: it then decodes another text than it was given."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhfjax.text.continuation import parts_of
from rlhfjax.text.sentencepiece_json import SPACE

_NORMALIZERS = {
    "Lowercase": "lower-cases it",
    "StripAccents": "takes accents away",
    "BertNormalizer": "cleans it as BERT does (case, accents, white space)",
    "Precompiled": "rewrites it by SentencePiece's table (full-width forms, ligatures, white space)",
    "Nmt": "rewrites its white space",
    "Strip": "takes white space from its ends",
}
_DROP_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit")


def unkept(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """What the parts of a tokenizer.json do to a text, one clause each; none where every text comes back."""
    return tuple(dict.fromkeys(_unkept(tokenizer)))


def _unkept(tokenizer: Mapping[str, Any]) -> Iterator[str]:
    for part in parts_of(tokenizer.get("normalizer")):
        if part["type"] in ("NFC", "NFD", "NFKC", "NFKD"):
            yield f"writes it in {part['type']}"
        elif part["type"] == "Replace" and part.get("pattern") != {"String": " "}:
            yield f"replaces {' '.join(map(str, part.get('pattern', {}).values()))!r} by {part.get('content')!r}"
        elif part["type"] in _NORMALIZERS:
            yield _NORMALIZERS[part["type"]]
    cuts = list(parts_of(tokenizer.get("pre_tokenizer")))
    for part in cuts:
        if part["type"] in _DROP_SPACES:
            yield "drops its white space"
        spaced = part["type"] == "Metaspace" and part.get("replacement") == SPACE
        if (spaced and part.get("prepend_scheme", "always") != "never") or part.get("add_prefix_space"):
            yield "drops a space at its very beginning"
    model = tokenizer["model"]
    if not model.get("byte_fallback") and not any(part["type"] == "ByteLevel" for part in cuts):
        yield "has no bytes for characters outside its vocabulary"
