"""The tokenizer that the metadata of a GGUF file describes."""

from collections.abc import Mapping
from typing import Any

from rlhfjax.errors import IntegrityError
from rlhfjax.text.huggingface_files import description
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.sentencepiece_json import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, tokenizer_json

_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

# How text is cut before pairs are joined: what the published tokenizer.json of each of these models says.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _cut_by(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}


def _words(digits: str) -> str:
    """Contractions, words, digits, punctuation, and white space up to the next word, as Llama 3 and Qwen 2 cut them."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )


_GPT2 = _BYTE_LEVEL | {"use_regex": True}
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]},
    "llama-bpe": _cut_by(_words(r"\p{N}{1,3}")),
    "qwen2": _cut_by(_words(r"\p{N}")),
}
_NORMALIZERS = {"qwen2": {"type": "NFC"}}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is in the vocabulary is taken whole, whatever pairs would make of it
_BEGIN_WITH_BOS = ("llama-bpe",)  # where the file does not say


def tokenizer_of_metadata(metadata: Mapping[str, Any]) -> tuple[HuggingFaceTokenizer | None, str]:
    """The tokenizer, or None and the reason. Raises IntegrityError where the parts do not fit together."""
    kind, pre = _get(metadata, "model"), _get(metadata, "pre", "")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in _PRE_TOKENIZERS):
        name = f"{kind!r} with the word splitter {pre!r}" if kind else "none"
        return None, f"the tokenizer of the file is {name}, which rlhfjax does not rebuild; the model takes ids only"
    if str(metadata.get("general.architecture", "")).startswith("gemma"):
        return None, "the scores of a Gemma tokenizer in GGUF are not the order of its pairs; the model takes ids only"
    pieces = _pieces(metadata)
    if kind == "gpt2":
        built, adds_bos = _byte_level(pieces, _get(metadata, "merges", []), pre), pre in _BEGIN_WITH_BOS
    else:
        built, adds_bos = tokenizer_json(pieces, prefix=_prefix(metadata)), True
    named = {name: _token(metadata, pieces, key) for name, key in _SPECIAL_IDS.items()}
    adds_bos = bool(_get(metadata, "add_bos_token", adds_bos)) and named["bos_token"] is not None
    ends = [index for key in ("eot_token_id", "eom_token_id") if (index := _get(metadata, key)) is not None]
    template = metadata.get("tokenizer.chat_template")
    return HuggingFaceTokenizer(description(built, named, adds_bos=adds_bos, eos_ids=ends, chat_template=template)), ""


def _get(metadata: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}", otherwise)


def _prefix(metadata: Mapping[str, Any]) -> str:
    return "first" if _get(metadata, "add_space_prefix", True) else "never"


def _pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    tokens = _get(metadata, "tokens", [])
    kinds = _get(metadata, "token_type") or [NORMAL] * len(tokens)
    scores = _get(metadata, "scores") or [0.0] * len(tokens)
    if not tokens or len(tokens) != len(kinds) or len(tokens) != len(scores) or len(set(tokens)) != len(tokens):
        raise IntegrityError(
            f"expected tokens that are all different, each with a type and a score, got {len(tokens):,} tokens, "
            f"{len(set(tokens)):,} of them different, {len(kinds):,} types and {len(scores):,} scores"
        )
    return [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)]


def _token(metadata: Mapping[str, Any], pieces: list[Piece], key: str) -> str | None:
    index = _get(metadata, key)
    if index is not None and not 0 <= index < len(pieces):
        raise IntegrityError(f"tokenizer.ggml.{key}: expected an id in 0…{len(pieces) - 1}, got {index}")
    return None if index is None else pieces[index].text


def _byte_level(pieces: list[Piece], merges: list[str], pre: str) -> dict[str, Any]:
    """tokenizer.json of a BPE over bytes (Radford et al. 2019)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": piece.text, **flags, "special": piece.kind != USER_DEFINED}
            for index, piece in enumerate(pieces)
            if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _GPT2,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
            "vocab": {piece.text: index for index, piece in enumerate(pieces)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
