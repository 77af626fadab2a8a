"""SentencePiece models as tokenizer.json: the form that the library `tokenizers` reads.

SentencePiece joins the neighbours whose union is the piece with the highest score, leftmost first. A BPE model of
`tokenizers` joins by a ranked list of pairs. Every way to split a piece into two pieces, ordered by the score of the
whole, is that list (Sennrich et al. 2016; Kudo and Richardson 2018).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sentencepiece

from rlhfjax.errors import ConfigError, IntegrityError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of SentencePiece's ModelProto; GGUF's too
SPACE = "\u2581"


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary; `kind` is NORMAL … BYTE."""

    text: str
    score: float
    kind: int


def read_model(model: bytes) -> tuple[list[Piece], Any]:
    """The pieces of a serialised model, and all of it (ModelProto). Raises IntegrityError on bytes that are none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes the class when imported
    try:
        proto.ParseFromString(model)
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"expected a SentencePiece model, got {len(model):,} other bytes; fetch it again"
        ) from error
    return [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces], proto


def named_by_model(model: bytes) -> dict[str, str]:
    """The special tokens that a serialised model has: bos_token, eos_token, unk_token, pad_token."""
    pieces, proto = read_model(model)
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return {f"{name}_token": pieces[index].text for name, index in ids.items() if 0 <= index < len(pieces)}


def tokenizer_json_of_model(model: bytes, legacy: bool = False) -> dict[str, Any]:
    """tokenizer.json of a serialised BPE model, with its own normalisation.

    `legacy` puts the space before every run of text between special tokens, as the first Llama tokenizers do; else it
    comes once, at the very beginning. Raises ConfigError for a unigram model, IntegrityError on bytes that are none.
    """
    pieces, proto = read_model(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ConfigError(
            "tokenizer.model: expected a SentencePiece model of type BPE, got another type; give the tokenizer as "
            "tokenizer.json"
        )
    spec, prefix = proto.normalizer_spec, "never"
    if spec.add_dummy_prefix:
        prefix = "always" if legacy else "first"
    normalizers: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        import base64

        normalizers.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
        )
    if spec.remove_extra_whitespaces:
        normalizers += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    return tokenizer_json(pieces, prefix=prefix, normalizers=normalizers)


def tokenizer_json(
    pieces: Sequence[Piece],
    *,
    prefix: str,
    normalizers: Sequence[dict[str, Any]] = (),
    space: str = SPACE,
    merges: Sequence[list[str]] | None = None,
) -> dict[str, Any]:
    """tokenizer.json of the pieces of a BPE model.

    `prefix` says where a space is put before a text: never, first (at its very beginning) or always (after special
    tokens too). A text that begins with a space gets another, as SentencePiece does it, or it would lose its own.
    `space` is how the pieces write one; where that is a space itself, nothing is replaced in the text. `merges` are the
    pairs, best first, where they do not follow from the scores.
    """
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps, cuts = list(normalizers), []
    if prefix == "always":
        steps.append({"type": "Prepend", "prepend": space})
    if space != " ":
        decoders.insert(0, {"type": "Replace", "pattern": {"String": space}, "content": " "})
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": space})
    if prefix == "first":
        # Metaspace alone knows where a text begins. It puts nothing before what begins with its own letter: no text
        # does when that is a space, since all are written otherwise by then.
        cuts = [_metaspace(" ", "first"), _metaspace(space, "never")]
    if prefix != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, piece) for index, piece in enumerate(pieces) if piece.kind in _ADDED],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece.text for piece in pieces if piece.kind == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(pieces)},
            "merges": list(_merges(pieces) if merges is None else merges),
        },
    }


def _metaspace(letter: str, prefix: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": letter, "prepend_scheme": prefix, "split": False}


_ADDED = (UNKNOWN, CONTROL, USER_DEFINED)


def _added_token(index: int, piece: Piece) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": piece.text, **flags, "special": piece.kind != USER_DEFINED}


def _merges(pieces: Sequence[Piece]) -> Iterator[list[str]]:
    """All pairs of pieces that make a piece, best first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    for whole in sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text]):
        for cut in range(1, len(whole)):
            if whole[:cut] in scores and whole[cut:] in scores:
                yield [whole[:cut], whole[cut:]]
