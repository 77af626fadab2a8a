"""Special tokens under names that no text has, so that none can be spelled."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Seal:
    """The special tokens of a tokenizer and the `names` they have in memory: each its own, with the random `salt`.

    What a chat template wrote has these names, so that text in it which spells a special token stays text.
    """

    salt: str
    names: Mapping[str, str]

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> "Seal":
        """A new one of the special tokens of a tokenizer.json.

        One that is a single letter is text that people need: some models pad with "!".
        """
        salt, added = secrets.token_hex(16), tokenizer["added_tokens"]
        special = [token["content"] for token in added if token["special"] and len(token["content"]) > 1]
        return cls(salt, {token: f"{token}{salt}" for token in special})

    def put_on(self, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
        """tokenizer.json with special tokens under these names."""
        names = self.names
        added = [
            {**token, "content": names[token["content"]], "normalized": False} if token["content"] in names else token
            for token in tokenizer["added_tokens"]
        ]
        model = {**tokenizer["model"], "dropout": None} if "dropout" in tokenizer["model"] else dict(tokenizer["model"])
        vocab = model["vocab"]
        if isinstance(vocab, list):
            model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
        else:
            model["vocab"] = {names.get(token, token): index for token, index in vocab.items()}
            # The library numbers added tokens itself where the vocabulary does not: others than the file, after a gap.
            numbers = {token["content"]: token["id"] for token in added}
            model["vocab"] |= {token: index for token, index in numbers.items() if token not in model["vocab"]}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            # A pair that makes a special token would make it from text, and one that begins with it never occurs.
            model["merges"] = [
                pair for pair in pairs if not (pair[0] in names or pair[1] in names or pair[0] + pair[1] in names)
            ]
        # Lengths and special tokens at the ends are decided here, never by the file.
        fixed = {"added_tokens": added, "model": model, "truncation": None, "padding": None, "post_processor": None}
        return {**tokenizer, **fixed}

    def shown(self, written: str) -> str:
        """What a template wrote, without special tokens."""
        return self._any.sub("", written)

    def special_tokens(self, written: str) -> list[str]:
        """Those in what a template wrote, in their order."""
        return [self.taken_off(name) for name in self._any.findall(written)]

    def taken_off(self, written: str) -> str:
        """What a template wrote, special tokens under their own names."""
        return written.replace(self.salt, "")

    def from_last(self, written: str) -> str:
        """What a template wrote, from its last special token on.

        Ids of what follows depend on no more of it, since a special token parts what is before it from what is after.
        """
        end = written.rfind(self.salt) + len(self.salt)
        name = next((name for name in self.names.values() if written.endswith(name, 0, end)), "")
        return name + written[end:] if name else written

    @cached_property
    def _any(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.names.values())) or "(?!)")
