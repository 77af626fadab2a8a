"""Tokenizers of either kind: from a directory, from a checkpoint, and as the files of a Hugging Face directory."""

import os
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.text.huggingface_files import around, description, files, source_of
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.sentencepiece_json import SPACE, Piece, read_model, tokenizer_json
from rlhfjax.text.tokenizer import MODEL_FILE, Tokenizer

AnyTokenizer = Tokenizer | HuggingFaceTokenizer
KINDS: dict[str, Any] = {Tokenizer.kind: Tokenizer, HuggingFaceTokenizer.kind: HuggingFaceTokenizer}

# The conversation as `rlhfjax.text.chat` writes it with role tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load_tokenizer(directory: str | os.PathLike[str]) -> AnyTokenizer:
    """The tokenizer in a directory of this project or of Hugging Face (tokenizer.json, tokenizer.model, or two files).

    Raises ConfigError where there is none, IntegrityError on one that is broken.
    """
    directory = Path(directory)
    if source_of(directory) not in ((), (MODEL_FILE,)):
        return HuggingFaceTokenizer.load(directory)
    try:
        return Tokenizer.load(directory)
    except ConfigError:
        # A SentencePiece model of somebody else has other special ids and no role tokens.
        if not (directory / MODEL_FILE).is_file():
            raise
    return HuggingFaceTokenizer.load(directory)


def tokenizer_from(kind: str, data: bytes) -> AnyTokenizer:
    """The tokenizer of a kind whose `to_bytes` gave `data`. Raises IntegrityError on an unknown kind or broken data."""
    if kind not in KINDS:
        raise IntegrityError(f"expected a tokenizer of kind {' or '.join(KINDS)}, got {kind!r}; update rlhfjax")
    return KINDS[kind].from_bytes(data)


def to_huggingface(tokenizer: AnyTokenizer) -> dict[str, str]:
    """The files by which AutoTokenizer of transformers gives the same ids and texts, by name.

    What does not go with them is `not_exported`. Raises ConfigError for a unigram model, whose best segmentation
    SentencePiece finds in float32 and `tokenizers` in float64: ids would differ now and then.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return files(_beginning_alike(tokenizer))
    pieces, proto = read_model(tokenizer.to_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ConfigError("expected a tokenizer of kind bpe to export, got unigram, which has no exact tokenizer.json")
    # Pieces are written with spaces. U+2581, which SentencePiece writes for one, is then a letter that is in no piece,
    # and is spelled in bytes, as here.
    spaced = [Piece(piece.text.replace(SPACE, " "), piece.score, piece.kind) for piece in pieces]
    made = tokenizer_json(spaced, prefix="never", space=" ")
    bos, eos, unk, pad = (pieces[index].text for index in (Tokenizer.bos_id, Tokenizer.eos_id, Tokenizer.unk_id, 0))
    made["post_processor"] = _puts_before(bos, Tokenizer.bos_id)
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    return files(description(made, named, adds_bos=True, chat_template=CHAT_TEMPLATE))


def not_exported(tokenizer: AnyTokenizer) -> tuple[str, ...]:
    """What holds of a tokenizer here and no longer where transformers reads its files, one sentence each."""
    said = [
        "A text that spells a special token is read as that token; `split_special_tokens=True` leaves it a text. In "
        "the contents of `apply_chat_template` nothing does: take special tokens out of what users write."
    ]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        if tokenizer.spells_space_symbol:
            said.append("U+2581, in which this vocabulary writes a space, becomes a space.")
        if tokenizer.prefixes:
            said.append(
                "A space is put before every text, and may be taken from a decoded one: decode the ids of an answer "
                "together with those of its prompt."
            )
    return tuple(said)


def _beginning_alike(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """The description with BOS, and nothing else, put around a plain text, if that is what is put there here."""
    described = tokenizer.description
    bos = None if tokenizer.bos_id is None else described["named"]["bos_token"]
    if around(described["tokenizer"]) == ([] if bos is None else [bos]):
        return described
    puts = None if bos is None or tokenizer.bos_id is None else _puts_before(bos, tokenizer.bos_id)
    return described | {"tokenizer": described["tokenizer"] | {"post_processor": puts}}


def _puts_before(bos: str, index: int) -> dict[str, Any]:
    """The post-processor of tokenizer.json that puts BOS before a text."""
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
