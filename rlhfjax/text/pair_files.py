"""A BPE over bytes in two files, as GPT-2 came: vocab.json with the ids, merges.txt with the pairs, best first.

Neither says how words are cut; the class of the tokenizer does, in tokenizer_config.json or as that of the architecture
in config.json.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.text.word_splitters import BYTES, SPLITTERS, pre_tokenizer


class _Class(NamedTuple):
    """How a class of transformers cuts words, and the special tokens that it has where no file names them."""

    splitter: str
    named: Mapping[str, str]


_END = "<|endoftext|>"
_GPT2 = _Class("gpt-2", {"bos_token": _END, "eos_token": _END, "unk_token": _END})
_CLASSES = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "Qwen2Tokenizer": _Class("qwen2", {"eos_token": _END, "pad_token": _END}),
}
_OF_MODEL = {
    "gpt2": "GPT2Tokenizer",
    "phi": "CodeGenTokenizer",
    "codegen": "CodeGenTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}


def class_of(where: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The class that tokenizer_config.json names, or that the architecture of config.json has.

    Raises ConfigError on a class whose way to cut words is not known, and where nothing names one.
    """
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or _OF_MODEL.get(str(model.get("model_type")))
    name = str(name).removesuffix("Fast")
    if name not in _CLASSES:
        raise ConfigError(
            f"{where}: expected vocab.json and merges.txt of a {', '.join(_CLASSES)}, got "
            f"{'no tokenizer_class' if name == 'None' else name} in tokenizer_config.json; fetch its tokenizer.json, "
            "or name the class that cuts words as it does"
        )
    return name


def named_by(name: str) -> Mapping[str, str]:
    """The special tokens of a class."""
    return _CLASSES[name].named


def tokenizer_json_of_pairs(
    where: str, name: str, vocab: Mapping[str, Any], merges: str, added: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """tokenizer.json of two files and of added_tokens.json. Raises IntegrityError on a line that is no pair."""
    splitter, special = SPLITTERS[_CLASSES[name].splitter], set(config.get("additional_special_tokens") or ())
    cuts = pre_tokenizer(splitter)
    if config.get("add_prefix_space"):
        cuts = _with_space(cuts)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": int(index), "content": token, **flags, "special": token in special}
            for token, index in sorted(added.items(), key=lambda entry: int(entry[1]))
        ],
        "normalizer": splitter.normalizer,
        "pre_tokenizer": cuts,
        "post_processor": None,
        "decoder": BYTES | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitter.whole_words,
            "vocab": dict(vocab),
            "merges": list(_pairs(where, merges)),
        },
    }


def _with_space(cuts: dict[str, Any]) -> dict[str, Any]:
    if "pretokenizers" in cuts:
        *before, last = cuts["pretokenizers"]
        return cuts | {"pretokenizers": [*before, _with_space(last)]}
    return cuts | {"add_prefix_space": True}


def _pairs(where: str, merges: str) -> Iterator[list[str]]:
    for number, line in enumerate(merges.split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise IntegrityError(f"{where}:{number}: expected two parts with a space between, got {line[:60]!r}")
        yield pair
