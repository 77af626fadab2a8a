"""Tokenizers of published models, on the library `tokenizers`; their special tokens cannot be spelled by any text.

Ids are those of transformers' AutoTokenizer, with two differences that are meant. transformers turns "<|im_end|>" in a
text into the special token, so that whoever writes a message can end it and speak for somebody else. Here the special
tokens are *sealed*. In memory each has a name with a random part, in the vocabulary too, and only what the chat
template writes is translated to those names. Text that says "<|im_end|>" stays text, as with SentencePiece. And where
the vocabulary writes spaces as U+2581, that letter in a text is spelled in bytes, and comes back.

`eos_id` is the id that ends a response in training: the special token that the chat template writes after an answer,
or else the model's end of text. Generation stops at any of `end_ids`: that one, and all that the model's files name.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from rlhfjax.errors import ConfigError, DataError, IntegrityError
from rlhfjax.text.chat_writing import ChatSettings, ChatWriter, Message
from rlhfjax.text.continuation import parts_of, prefixes_every_part, taking_prefix, without_prefix
from rlhfjax.text.huggingface_files import files, read_files
from rlhfjax.text.sealing import Seal
from rlhfjax.text.sentencepiece_json import SPACE
from rlhfjax.text.space_symbol import Spelling, encode, spelling
from rlhfjax.text.templates import ChatTemplate
from rlhfjax.text.tokenizer import check_unicode, write_atomically
from rlhfjax.text.unkept import unkept

DIGEST_FILE = "tokenizer.sha256"


class HuggingFaceTokenizer:
    """Text to ids and back, and conversations by the model's own chat template. Build one with `load` or `from_bytes`.

    `bos_id` is None where the model puts nothing before a text. `pad_id` may equal `eos_id`: masks come from lengths.
    """

    kind = "huggingface"

    def __init__(self, described: Mapping[str, Any]):
        """Open a description (`rlhfjax.text.huggingface_files.description`).

        Raises IntegrityError on one that is none, ConfigError on a tokenizer without an end of text.
        """
        self.description = dict(described)
        try:
            self.seal = Seal.of(described["tokenizer"])
            sealed = self.seal.put_on(taking_prefix(described["tokenizer"]))
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(sealed))
            ids = {token: self._tokenizer.token_to_id(name) for token, name in self.seal.names.items()}
            self._special = {token: index for token, index in ids.items() if index is not None}
            named = {name: self._id(token) for name, token in described["named"].items()}
        # The library raises plain Exception on a file that it cannot read.
        except Exception as error:
            raise IntegrityError(
                f"expected the parts of a tokenizer.json, got {_short(error)}; fetch it again"
            ) from error
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ends = [index for index in (named["eos_token"], *described["eos_ids"]) if index is not None]
        # An id outside the vocabulary ends nothing: configurations keep the defaults of larger ones.
        self.eos_ids = tuple(dict.fromkeys(index for index in ends if 0 <= index < self.vocab_size))
        if not self.eos_ids:
            raise ConfigError(
                f"expected a tokenizer with ends of text in 0…{self.vocab_size - 1}, got {ends}; name one as eos_token "
                "in tokenizer_config.json"
            )
        self.bos_id = named["bos_token"] if described["adds_bos"] else None
        self.unk_id = named["unk_token"]
        self.pad_id = self.eos_ids[0] if named["pad_token"] is None else named["pad_token"]
        self.chat_template = None if (source := described["chat_template"]) is None else ChatTemplate(source)
        named_tokens = {name: token for name, token in described["named"].items() if token is not None}
        sealed_tokens = {token: self.seal.names[token] for token in self._special}
        self.writer = ChatWriter(self.chat_template, named_tokens, sealed_tokens)

    @classmethod
    def from_bytes(cls, data: bytes) -> "HuggingFaceTokenizer":
        """The tokenizer that `to_bytes` wrote. Raises as `__init__`."""
        try:
            described = json.loads(data)
        except ValueError as error:
            raise IntegrityError(f"expected a tokenizer's JSON, got {len(data):,} other bytes") from error
        return cls(described)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "HuggingFaceTokenizer":
        """The tokenizer of a Hugging Face directory, or of one that `save` wrote.

        Raises ConfigError where there is none, IntegrityError when it is broken or its digest does not match.
        """
        directory = Path(directory)
        loaded, digest = cls(read_files(directory)), directory / DIGEST_FILE
        if digest.exists() and (expected := digest.read_text().strip()) != loaded.fingerprint:
            raise IntegrityError(
                f"{directory}: expected a tokenizer with SHA-256 {expected[:12]}…, got {loaded.fingerprint[:12]}…; "
                "restore its files or make it again"
            )
        return loaded

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files of a Hugging Face directory and a digest, each whole or not at all, for the owner only."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The digest goes first and comes back last: no crash in between can leave it beside other files.
        (directory / DIGEST_FILE).unlink(missing_ok=True)
        for name, content in files(self.description).items():
            write_atomically(directory / name, content.encode())
        write_atomically(directory / DIGEST_FILE, f"{self.fingerprint}\n".encode())

    def to_bytes(self) -> bytes:
        """The whole description as JSON, with its keys in order."""
        return json.dumps(self.description, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the description, in hex: equal fingerprints mean equal ids for every text."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def eos_id(self) -> int:
        """The id that ends a response: what the chat template writes after an answer, else the model's end of text.

        Of several tokens that it writes there, it is the one that the model's files name, else the first.
        """
        after = [self._special[token] for token in self.seal.special_tokens(self.writer.after_answer)]
        return next((index for index in after if index in self.eos_ids), (after or self.eos_ids)[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """What this tokenizer does to texts so that they do not come back as they were, for whoever imports it."""
        changes = unkept(self.description["tokenizer"])
        return (f"the model's tokenizer does not keep every text: it {', '.join(changes)}",) if changes else ()

    @property
    def prefixes(self) -> bool:
        """Whether a space is put before a text, which one that goes on after other text has not."""
        return self._continuing is not self._tokenizer

    @property
    def spells_space_symbol(self) -> bool:
        """Whether U+2581 is spelled in bytes, or it would become a space."""
        return self._spelling is not None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a response: `eos_id` first, then the others that the model's files name."""
        return tuple(dict.fromkeys((self.eos_id, *self.eos_ids)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises DataError on a lone surrogate."""
        check_unicode(text)
        return encode(self._tokenizer, text, self._spelling)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return self._batch(self._tokenizer, texts)

    def encode_continuation(self, text: str, after: int | None = None) -> list[int]:
        """Ids of a text that goes on after other text: no space is put before it. Raises DataError as `encode`.

        `decode(encode(prompt) + encode_continuation(response))` is prompt + response. `after` is the id before, if
        known: text that follows a special token begins anew where the tokenizer puts a space before every such text.
        """
        check_unicode(text)
        return encode(self._after(after), text, self._spelling)

    def encode_continuation_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_continuation` of each text."""
        return self._batch(self._continuing, texts)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation by the model's template, with the beginning of an answer after it if asked for.

        Raises ConfigError without a template, DataError where it refuses these messages (`ChatWriter.write`).
        """
        return self.encode_written(self.writer.write(messages, add_generation_prompt, tools, kwargs))

    def encode_written(self, text: str) -> list[int]:
        """Ids of what `writer` wrote."""
        check_unicode(text)
        return encode(self._tokenizer, text, self._spelling)

    def encode_written_after(self, before: str, text: str) -> list[int]:
        """Ids of what `writer` wrote after `before`, whose ids stay what they are without it.

        They are those of the whole, unless a token would reach from `before` into `text`.
        """
        tail = self.seal.from_last(before)
        first, whole = self.encode_written(tail), self.encode_written(tail + text)
        if whole[: len(first)] == first:
            return whole[len(first) :]
        return encode(self._continuing, text, self._spelling)

    @cached_property
    def end_names(self) -> re.Pattern[str]:
        """What `writer` writes for the tokens that end a response."""
        names = [self._named(index) for index in self.end_ids]
        return re.compile("|".join(re.escape(name) for name in names if name) or "(?!)")

    def with_chat(self, settings: ChatSettings) -> "HuggingFaceTokenizer":
        """The same tokenizer, whose conversations are written with these settings.

        Raises ConfigError on variables that the chat template does not read.
        """
        made = copy.copy(self)
        made.writer = self.writer.with_settings(settings)
        return made

    @property
    def chat(self) -> ChatSettings:
        """What the template is told besides the conversation."""
        return self.writer.settings

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes, a run of which is decoded as one: a byte that fits nowhere makes all of it U+FFFD."""
        given = self.description["tokenizer"]
        if not any(part["type"] == "ByteFallback" for part in parts_of(given.get("decoder"))):
            return frozenset()
        ids = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(index for index in ids if index is not None)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens dropped; bytes that are no UTF-8 (a cut character) become U+FFFD.

        Raises DataError on an id outside the vocabulary.
        """
        return self._tokenizer.decode(self._known(ids), skip_special_tokens=True)

    def decode_continuation(self, ids: Iterable[int], after: int | None = None) -> str:
        """Text of ids that go on after others, a space at its beginning included: `encode_continuation`, undone."""
        return self._after(after).decode(self._known(ids), skip_special_tokens=True)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, as the vocabulary writes it ("Ġthe", "<|im_end|>"): for labels and tables."""
        names = {index: token for token, index in self._special.items()}
        return [names.get(int(token)) or self._tokenizer.id_to_token(int(token)) or "" for token in ids]

    def _batch(self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_unicode(text)
        made = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._spelling:
            for place, text in enumerate(texts):
                if SPACE in text:
                    made[place] = encode(tokenizer, text, self._spelling)
        return made

    @cached_property
    def _spelling(self) -> Spelling | None:
        return spelling(self._tokenizer)

    def _known(self, ids: Iterable[int]) -> list[int]:
        ids = [int(token) for token in ids]
        outside = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise DataError(f"expected token ids in 0…{self.vocab_size - 1}, got {outside}; is this its tokenizer?")
        return ids

    def _after(self, index: int | None) -> tokenizers.Tokenizer:
        return self._tokenizer if index is not None and index in self._begins_anew else self._continuing

    @cached_property
    def _begins_anew(self) -> frozenset[int]:
        given = self.description["tokenizer"]
        return frozenset(token["id"] for token in given["added_tokens"] if prefixes_every_part(given))

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        given = self.description["tokenizer"]
        made = without_prefix(given)
        changed = any(made[key] != given.get(key) for key in ("normalizer", "pre_tokenizer", "decoder"))
        return tokenizers.Tokenizer.from_str(json.dumps(self.seal.put_on(made))) if changed else self._tokenizer

    def _named(self, index: int) -> str | None:
        token = next((token for token, other in self._special.items() if other == index), None)
        return self._tokenizer.id_to_token(index) if token is None else self.seal.names[token]

    def _id(self, token: str | None) -> int | None:
        if token is None:
            return None
        return self._special[token] if token in self._special else self._tokenizer.token_to_id(token)


def _short(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
