"""The tokenizer of a Hugging Face directory, as one description, and back.

What a model does with text is spread over files: tokenizer.json holds the vocabulary (or a SentencePiece
tokenizer.model alone, or vocab.json with merges.txt), tokenizer_config.json and special_tokens_map.json name special
tokens, chat_template.jinja is its way to write a conversation, and generation_config.json (or else config.json) says
which ids end an answer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.text.pair_files import class_of, named_by, tokenizer_json_of_pairs
from rlhfjax.text.sentencepiece_json import named_by_model, tokenizer_json_of_model

PAIR_FILES = ("vocab.json", "merges.txt")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_LARGEST = 1 << 28  # bytes of one file; the largest tokenizer.json in use has under 40 MB


def description(
    tokenizer: Mapping[str, Any],
    named: Mapping[str, str | None],
    *,
    adds_bos: bool,
    eos_ids: list[int] | None = None,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """All that a Hugging Face tokenizer is: tokenizer.json, its named special tokens, the other end ids, the template.

    `adds_bos` says whether BOS comes before a plain text.
    """
    return {
        "tokenizer": dict(tokenizer),
        "named": {name: named.get(name) for name in NAMED},
        "adds_bos": adds_bos,
        "eos_ids": eos_ids or [],
        "chat_template": chat_template,
    }


def read_files(directory: Path) -> dict[str, Any]:
    """The description of the tokenizer in a directory.

    Raises ConfigError where there is none or its kind is unknown, IntegrityError on a file that cannot be read.
    """
    config = _json(directory / "tokenizer_config.json")
    tokenizer, defaults = _vocabulary(directory, config)
    named = {**defaults, **_json(directory / "special_tokens_map.json"), **config}
    try:
        named = {name: _content(named.get(name)) for name in NAMED}
        _add_tokens(tokenizer, config.get("added_tokens_decoder") or {}, [token for token in named.values() if token])
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:  # SentencePiece's models with BPE begin with BOS, as Llama's
            of_model = source_of(directory) == ("tokenizer.model",) and named["bos_token"] is not None
            adds_bos = of_model or (named["bos_token"] is not None and around(tokenizer)[:1] == [named["bos_token"]])
        return description(
            tokenizer,
            named,
            adds_bos=bool(adds_bos),
            eos_ids=_end_ids(directory),
            chat_template=_chat_template(directory, config),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{directory}: expected the files of a tokenizer, got other JSON ({type(error).__name__}: {error}); fetch "
            "tokenizer.json and tokenizer_config.json again"
        ) from error


def source_of(directory: Path) -> tuple[str, ...]:
    """The names of the files of a directory that hold the vocabulary; none where there is no tokenizer."""
    kinds = (("tokenizer.json",), ("tokenizer.model",), PAIR_FILES)
    return next((names for names in kinds if all((directory / name).is_file() for name in names)), ())


def _vocabulary(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """tokenizer.json, read or made of other files, and the special tokens that go without saying."""
    names = source_of(directory)
    if names == ("tokenizer.json",):
        return _json(directory / names[0]), {}
    if names == ("tokenizer.model",):
        model = _bytes(directory / names[0])
        return tokenizer_json_of_model(model, legacy=bool(config.get("legacy"))), named_by_model(model)
    if not names:
        raise ConfigError(
            f"expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt in {directory}, got none of "
            "them; fetch one"
        )
    name = class_of(str(directory), config, _json(directory / "config.json"))
    vocab, added = _json(directory / "vocab.json"), _json(directory / "added_tokens.json")
    merges = directory / "merges.txt"
    return tokenizer_json_of_pairs(str(merges), name, vocab, _text(merges), added, config), named_by(name)


def files(described: Mapping[str, Any]) -> dict[str, str]:
    """The files of a directory that `read_files` and AutoTokenizer of transformers read, by name."""
    named = {name: token for name, token in described["named"].items() if token is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": described["adds_bos"],
        "clean_up_tokenization_spaces": False,
        **named,
    }
    made = {
        "tokenizer.json": json.dumps(described["tokenizer"], ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "special_tokens_map.json": json.dumps(named, ensure_ascii=False, indent=2),
    }
    if described["chat_template"] is not None:
        made["chat_template.jinja"] = described["chat_template"]
    if described["eos_ids"]:
        made["generation_config.json"] = json.dumps({"eos_token_id": described["eos_ids"]}, indent=2)
    return made


def _add_tokens(tokenizer: dict[str, Any], more: Mapping[str, Any], named: list[str]) -> None:
    """Adds what tokenizer_config.json says of added tokens, which goes before tokenizer.json, and the named tokens."""
    model = tokenizer["model"]["vocab"]
    vocab = {entry[0]: index for index, entry in enumerate(model)} if isinstance(model, list) else model
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens") or []}
    for index, token in more.items():
        added[int(index)] = {**_FLAGS, **{key: token[key] for key in _FLAGS if key in token}, "id": int(index)}
    # What ends or begins a text is special, whatever the file says: no text may spell it.
    added = {at: {**token, "special": token["special"] or token["content"] in named} for at, token in added.items()}
    known = {token["content"] for token in added.values()}
    for content in named:
        if content not in known:
            index = vocab.get(content, max([*added, *vocab.values()], default=-1) + 1)
            added[index] = {**_FLAGS, "id": index, "content": content, "special": True}
            known.add(content)
    tokenizer["added_tokens"] = [added[index] for index in sorted(added)]


_FLAGS = {"content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def around(tokenizer: Mapping[str, Any]) -> list[str]:
    """The special tokens that the post-processor of tokenizer.json puts around a text."""
    if not tokenizer.get("post_processor"):
        return []
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    alone = {"version": "1.0", "added_tokens": [], "model": empty, "post_processor": tokenizer["post_processor"]}
    return tokenizers.Tokenizer.from_str(json.dumps(alone)).encode("").tokens


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _text(path)
    template = config.get("chat_template") or _json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _end_ids(directory: Path) -> list[int]:
    """The ids that end an answer: of generation_config.json, or else of config.json, as transformers has it."""
    config = _json(directory / "config.json")
    text = config.get("text_config")
    for settings in (_json(directory / "generation_config.json"), config, text if isinstance(text, Mapping) else {}):
        ids = settings.get("eos_token_id")
        if ids is not None and ids != []:
            return [int(index) for index in (ids if isinstance(ids, list) else [ids])]
    return []


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        made = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: expected JSON, got {error}; fetch the file again") from error
    if not isinstance(made, dict):
        raise IntegrityError(f"{path}: expected a JSON object, got {type(made).__name__}; fetch the file again")
    return made


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: expected UTF-8, got other bytes at {error.start}; fetch it again") from error


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise IntegrityError(f"{path}: expected at most {_LARGEST:,} bytes, got {path.stat().st_size:,}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be read, got {error.strerror}") from error
