"""The tokenizer that the metadata of a GGUF file describes: SentencePiece with BPE, or a BPE over bytes."""

from collections.abc import Mapping
from typing import Any

from rlhfjax.errors import IntegrityError
from rlhfjax.text.huggingface_files import description
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.sentencepiece_json import NORMAL, Piece, tokenizer_json
from rlhfjax.text.word_splitters import BYTES, OF_ARCHITECTURE, SPLITTERS, Splitter, pre_tokenizer

_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_JOINS = ("gpt2", "llama", "gemma4")
_NOT_REBUILT = {
    "bert": "a WordPiece (BERT)",
    "t5": "a unigram model (T5)",
    "rwkv": "of RWKV",
    "plamo2": "of PLaMo 2",
}


def tokenizer_of_metadata(metadata: Mapping[str, Any]) -> tuple[HuggingFaceTokenizer | None, str]:
    """The tokenizer and what to know of it, or None and the reason. Raises IntegrityError where parts do not fit."""
    kind, splitter = _get(metadata, "model"), _splitter(metadata)
    if kind not in _JOINS or (kind == "gpt2" and splitter is None):
        return None, _why_not(metadata)
    pieces, adds_bos = _pieces(metadata), True
    if kind == "llama":
        prefix = "always" if _get(metadata, "add_space_prefix", True) else "never"  # after special tokens too
        built = tokenizer_json(pieces, prefix=prefix)
    elif splitter is None:  # Gemma's from 4 on: pieces of SentencePiece, with pairs of their own
        built = tokenizer_json(pieces, prefix="never", merges=_merges(metadata))
    else:
        built, adds_bos = _byte_level(pieces, _merges(metadata), splitter), splitter.begins
    named = {name: _token(metadata, pieces, key) for name, key in _SPECIAL_IDS.items()}
    adds_bos = bool(_get(metadata, "add_bos_token", adds_bos)) and named["bos_token"] is not None
    ends = [index for key in ("eot_token_id", "eom_token_id") if (index := _get(metadata, key)) is not None]
    template = metadata.get("tokenizer.chat_template")
    made = HuggingFaceTokenizer(description(built, named, adds_bos=adds_bos, eos_ids=ends, chat_template=template))
    return made, " ".join(made.notes)


def _splitter(metadata: Mapping[str, Any]) -> Splitter | None:
    """How words are cut; None where nothing says so, or nothing is cut."""
    pre = _get(metadata, "pre") or OF_ARCHITECTURE.get(str(metadata.get("general.architecture")))
    return SPLITTERS.get(str(pre)) if _get(metadata, "model") == "gpt2" else None


def _why_not(metadata: Mapping[str, Any]) -> str:
    kind, pre = _get(metadata, "model"), _get(metadata, "pre")
    if kind in _NOT_REBUILT:
        name = f"{_NOT_REBUILT[kind]}, which rlhfjax does not rebuild"
    elif kind == "gpt2":
        known = ", ".join(sorted(SPLITTERS))
        named = f"the word splitter {pre!r}" if pre else "no word splitter (tokenizer.ggml.pre; convert the model anew)"
        name = f"a BPE over bytes with {named}; rlhfjax knows {known}"
    else:
        name = f"{kind!r}; rlhfjax knows {', '.join(_JOINS)}" if kind else "none"
    return f"the tokenizer of the file is {name}; the model takes ids only"


def _merges(metadata: Mapping[str, Any]) -> list[list[str]]:
    """Pairs, written with a space between; their first part may itself begin with one."""
    cut = [(merge, merge.find(" ", 1)) for merge in _get(metadata, "merges", [])]
    return [[merge[:at], merge[at + 1 :]] for merge, at in cut]


def _get(metadata: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}", otherwise)


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


def _byte_level(pieces: list[Piece], merges: list[list[str]], splitter: Splitter) -> dict[str, Any]:
    """tokenizer.json of a BPE over bytes (Radford et al. 2019)."""
    built = tokenizer_json(pieces, prefix="never", space=" ", merges=merges)
    model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": splitter.whole_words}
    return built | {
        "normalizer": splitter.normalizer,
        "pre_tokenizer": pre_tokenizer(splitter),
        "decoder": BYTES | {"use_regex": True},
        "model": built["model"] | model,
    }
