"""The same tokenizer for text that goes on after other text.

Many tokenizers put a space before a text, so that its first word is the word that it is elsewhere (the dummy prefix of
SentencePiece). Before a response that follows a prompt it would be a space that nobody wrote. Here tokenizer.json is
rewritten so that it puts no space before a text, and takes none from what it decodes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_PARTS = ("normalizers", "pretokenizers", "decoders")


def without_prefix(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json without a space before a text. Equal to what was given where there is none."""
    made = dict(tokenizer)
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        made[step] = _without(tokenizer.get(step), step)
    return made


def prefixes_every_part(tokenizer: Mapping[str, Any]) -> bool:
    """Whether text after a special token gets a space before it too, as the first Llama tokenizers have it."""
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme") == "always" or part.get("add_prefix_space", False)
        for step in ("normalizer", "pre_tokenizer")
        for part in parts_of(tokenizer.get(step))
    )


def parts_of(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A step, and all that are in it."""
    if part is not None:
        yield part
        for key in _PARTS:
            for each in part.get(key, ()):
                yield from parts_of(each)


def taking_prefix(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json whose decoder takes away the space that a BPE over bytes puts before a text."""
    if not any(part.get("add_prefix_space") for part in parts_of(tokenizer.get("pre_tokenizer"))):
        return dict(tokenizer)
    steps = [step for step in (tokenizer.get("decoder"),) if step and step["type"] == "ByteLevel"]
    taken = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {**tokenizer, "decoder": {"type": "Sequence", "decoders": steps + taken}} if steps else dict(tokenizer)


def _without(part: Mapping[str, Any] | None, step: str) -> dict[str, Any] | None:
    if part is None:
        return None
    made = dict(part)
    for key in _PARTS:  # a sequence
        if key in made:
            made[key] = [kept for each in made[key] if (kept := _without(each, step)) is not None]
    if made["type"] == "Prepend" or (step == "decoder" and made["type"] == "Strip" and made.get("content") == " "):
        return None
    if made["type"] == "Metaspace":
        made["prepend_scheme"] = "never"
    if "add_prefix_space" in made and step == "pre_tokenizer":  # of ByteLevel, and of an older Metaspace
        made["add_prefix_space"] = False
    return made
