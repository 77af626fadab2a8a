"""A tokenizer as the metadata of a GGUF file describes one: `gguf_tokenizer`, undone, and proven by it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata
from rlhfjax.text.continuation import parts_of
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import CHAT_TEMPLATE, AnyTokenizer
from rlhfjax.text.sentencepiece_json import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece, read_model
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.text.word_splitters import SPLITTERS, pre_tokenizer

# Texts whose ids have to come back: words, numbers, signs, white space, other alphabets, and what is in no vocabulary.
PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 12,345.678 o'clock!",
    "  two spaces,\ttabs\n\nand\r\nlines   \n   and an end ",
    "def f(x):\n    return {'a': [x ** 2, -x], \"b\": x != 0}  # 100%\n",
    "Größe, naïve, Ω, Привет мир, 你好世界, こんにちは, مرحبا, नमस्ते, 👩‍🚀 \x07",
    "CamelCase HTTPServer x1y22z333 4444 ... --- ___ @user #tag http://a.b/c?d=e&f",
)
_LEAST = -1e9  # of a piece that no pair of pieces makes


def vocabulary_of(tokenizer: AnyTokenizer, size: int) -> dict[str, Any]:
    """Keys of the metadata and their values, filled up to the `size` of the model's table.

    Raises ConfigError for a tokenizer of which llama.cpp has no kind, or that gives other ids when it is read back.
    """
    told = _of_sentencepiece(tokenizer) if isinstance(tokenizer, Tokenizer) else _of_huggingface(tokenizer)
    pieces = told.pop("pieces")
    pieces += [Piece(f"[PAD{place}]", 0.0, UNUSED) for place in range(len(pieces), size)]
    texts, scores, kinds = zip(*pieces, strict=True)
    listed = {"tokens": list(texts), "scores": list(map(float, scores)), "token_type": list(map(int, kinds))}
    template = told.pop("chat_template")
    found = {f"tokenizer.ggml.{key}": value for key, value in (told | listed).items() if value is not None}
    found |= {"tokenizer.chat_template": template} if template else {}
    _prove(tokenizer, found)
    return found


def _of_sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
    pieces, proto = read_model(tokenizer.to_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ConfigError("expected a tokenizer of kind bpe to write as GGUF, got unigram")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    return {
        "model": "llama",
        "pieces": pieces,
        "add_bos_token": True,
        "add_space_prefix": False,
        "chat_template": CHAT_TEMPLATE,
        **{f"{name}_token_id": index for name, index in ids.items()},
    }


def _of_huggingface(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    described = tokenizer.description
    whole, named = described["tokenizer"], described["named"]
    model = whole["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"expected a tokenizer of kind BPE to write as GGUF, got {model['type']}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    own: dict[str, Any]
    if any(part["type"] == "ByteLevel" for part in parts_of(whole.get("pre_tokenizer"))):
        own = {"model": "gpt2", "pre": _splitter_of(whole), "merges": [" ".join(merge) for merge in merges]}
    else:
        own = {"model": "llama", "add_space_prefix": tokenizer.prefixes}
    pieces = _pieces(whole, merges if own["model"] == "llama" else None)
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    special = {key: ids.get(named[f"{name}_token"]) for name, key in _NAMED.items()}
    ends = [index for index in tokenizer.end_ids if index != special["eos_token_id"]]
    also = dict(zip(("eot_token_id", "eom_token_id"), ends, strict=False))
    return own | special | also | {
        "pieces": pieces,
        "add_bos_token": tokenizer.bos_id is not None,
        "chat_template": described["chat_template"],
    }  # fmt: skip


_NAMED = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def _pieces(whole: Mapping[str, Any], merges: list[tuple[str, ...]] | None) -> list[Piece]:
    """All entries by id; scores where `merges` are to follow from them: what is made earlier has a higher one."""
    vocab, bytes_too = whole["model"]["vocab"], whole["model"].get("byte_fallback")
    unknown = whole["model"].get("unk_token")
    ranks: dict[str, float] = {}
    for rank, parts in enumerate(merges or ()):
        ranks.setdefault("".join(parts), -float(rank + 1))
    other = 0.0 if merges is None else _LEAST
    made = {}
    for text, index in vocab.items():
        kind = UNKNOWN if text == unknown else NORMAL
        if bytes_too and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        made[index] = Piece(text, ranks.get(text, 0.0 if len(text) == 1 else other) if kind == NORMAL else 0.0, kind)
    for token in whole["added_tokens"]:
        kind = UNKNOWN if token["content"] == unknown else CONTROL if token["special"] else USER_DEFINED
        made[token["id"]] = Piece(token["content"], 0.0, kind)
    last = max(made) + 1
    return [made.get(index, Piece(f"[PAD{index}]", 0.0, UNUSED)) for index in range(last)]


def _splitter_of(whole: Mapping[str, Any]) -> str:
    """The name of the word splitter that cuts as this tokenizer.json does."""
    cuts, normalizer = list(_steps(whole.get("pre_tokenizer"))), list(_steps(whole.get("normalizer")))
    for name, splitter in SPLITTERS.items():
        alike = list(_steps(pre_tokenizer(splitter))) == cuts
        words = splitter.whole_words == bool(whole["model"].get("ignore_merges"))
        if alike and words and list(_steps(splitter.normalizer)) == normalizer:
            return name
    raise ConfigError(
        "expected a tokenizer that cuts words as one that llama.cpp has by name, got another pre_tokenizer, normalizer "
        "or ignore_merges; export it as a Hugging Face directory"
    )


def _steps(part: Any) -> Iterator[Any]:
    """What cuts or rewrites, said in one way."""
    for step in parts_of(part):
        if step["type"] == "Sequence":
            continue
        if step["type"] == "ByteLevel":
            yield ("ByteLevel", step.get("add_prefix_space", True), step.get("use_regex", True))
        elif step["type"] == "Digits":
            yield ("Digits", step.get("individual_digits", False))
        else:
            yield step


def _prove(tokenizer: AnyTokenizer, metadata: Mapping[str, Any]) -> None:
    """What is read back gives the same ids."""
    again, note = tokenizer_of_metadata({"general.architecture": "", **metadata})
    if again is None:
        raise ConfigError(f"export: expected a tokenizer that comes back from GGUF, got none: {note}")
    for text in PROBES:
        expected, got = tokenizer.encode(text), again.encode(text)
        if expected != got:
            at = next(i for i, (a, b) in enumerate(zip([*expected, -1], [*got, -1], strict=False)) if a != b)
            raise ConfigError(
                f"export: expected GGUF to keep the tokenizer, got other ids for {text[:20]!r}… from token {at} on; "
                "export it as a Hugging Face directory"
            )
