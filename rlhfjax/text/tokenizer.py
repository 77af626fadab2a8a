"""SentencePiece tokenizer: trained in memory, exact on every text, with special tokens that no text can spell.

Four choices make `decode(encode(text)) == text` for every valid string, and ids join as their texts do:

- Normalisation is `identity`. SentencePiece's default (nmt_nfkc) rewrites ligatures, full-width forms and runs of
  spaces, so the log-probability would be that of another text than the one people ranked.
- No dummy space at the start. With it a response that is generated after a prompt loses its first space. Without it
  `decode(prompt) + decode(response)` is the whole text, and ids of separate texts are concatenated, never re-tokenised.
- Bytes stand in for characters outside the vocabulary, newlines and tabs included.
- The letter U+2581, which SentencePiece uses to write a space, is spelled in bytes, or it would come back as a space.

PAD, BOS, EOS and the roles are control symbols: SentencePiece never produces them from text, so user text that says
"<|assistant|>" stays text. PAD ≠ EOS, so that a padding mask can never hide the end of a response.
"""

import hashlib
import io
import os
import random
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from rlhfjax.errors import ConfigError, DataError, IntegrityError
from rlhfjax.text.chat_writing import ChatSettings

PAD, BOS, EOS, UNK = 0, 1, 2, 3
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
MODEL_FILE, DIGEST_FILE = "tokenizer.model", "tokenizer.model.sha256"

_SPACE_SYMBOL = "\u2581"
# Where training text is cut: what SentencePiece reserves (it would skip the whole line or misread it), and line ends.
_TRAINING_BREAKS = re.compile("[\x00\t\n\r\u2581\u2585]+")
_CHUNK = 1000  # characters, at most 4,000 bytes: SentencePiece silently skips lines of more than 4,192 bytes


class Tokenizer:
    """Text to ids and back. Build one with `train`, `load` or `from_bytes`."""

    kind = "sentencepiece"
    pad_id, bos_id, eos_id, unk_id = PAD, BOS, EOS, UNK
    end_ids = (EOS,)  # every id that ends a response
    chat = ChatSettings()  # conversations have one form, and no date in it

    def __init__(self, model: bytes):
        """Open a serialised model. Raises IntegrityError on bytes that are none, ConfigError on foreign special ids."""
        self._model = model
        self._processor = _open(model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.role_ids = {role: self._processor.piece_to_id(token) for role, token in ROLE_TOKENS.items()}
        self._space_symbol_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_SYMBOL.encode()]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        model_type: Literal["bpe", "unigram"] = "bpe",
        max_sentences: int | None = None,
        seed: int = 0,
    ) -> "Tokenizer":
        """Train on texts; the same texts and arguments give the same bytes.

        `max_sentences` bounds memory: that many lines, drawn evenly under `seed`, are trained on. None takes all.
        Raises ConfigError when the corpus cannot give `vocab_size` pieces, saying what it can give; DataError without
        any text, or with text that is not valid Unicode. Source: Kudo and Richardson 2018; Sennrich et al. 2016 (bpe).
        """
        if model_type not in ("bpe", "unigram"):
            raise ConfigError(f"expected model_type 'bpe' or 'unigram', got {model_type!r}")
        lines = _sample(_training_lines(texts), max_sentences, seed)
        if not any(line.strip() for line in lines):
            raise DataError("expected text to train a tokenizer on, got none; check the data of the tokenizer")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                control_symbols=list(ROLE_TOKENS.values()),
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                num_threads=1,  # part of the bytes, so never the number of cores of the machine
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _vocabulary_error(error, vocab_size) from error
        return cls(model.getvalue())

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """The tokenizer that `to_bytes` wrote. Raises as `__init__`."""
        return cls(model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer in a directory that `save` wrote.

        Raises ConfigError where there is none, IntegrityError when its digest does not match what was written.
        """
        path = Path(directory) / MODEL_FILE
        try:
            model = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"expected a tokenizer at {path}, got {error.strerror}; train one first (stage `tokenizer`)"
            ) from error
        digest = path.with_name(DIGEST_FILE)
        if digest.exists():
            expected, actual = digest.read_text().split()[0], hashlib.sha256(model).hexdigest()
            if expected != actual:
                raise IntegrityError(
                    f"{path}: expected SHA-256 {expected[:12]}…, got {actual[:12]}…; restore the file or train it again"
                )
        return cls(model)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the model and its SHA-256 to a directory, each file whole or not at all, readable by the owner only."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The digest goes first and comes back last: no crash in between can leave it beside another model.
        (directory / DIGEST_FILE).unlink(missing_ok=True)
        write_atomically(directory / MODEL_FILE, self._model)
        write_atomically(directory / DIGEST_FILE, f"{self.fingerprint}  {MODEL_FILE}\n".encode())

    def with_chat(self, settings: ChatSettings) -> "Tokenizer":
        """This tokenizer. Raises ConfigError on variables for a chat template: there is none that could read them."""
        if settings.kwargs:
            raise ConfigError(
                f"chat_template_kwargs: expected none for this project's own tokenizer, got {sorted(settings.kwargs)}; "
                "remove them"
            )
        return self

    def to_bytes(self) -> bytes:
        """The serialised SentencePiece model."""
        return self._model

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model, in hex: equal fingerprints mean equal ids for every text."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises DataError on a lone surrogate."""
        check_unicode(text)
        if _SPACE_SYMBOL not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE_SYMBOL))
        return first + [token for part in rest for token in (*self._space_symbol_ids, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    # There is no space before a text, so one that goes on after another has the same ids, and they the same text.

    def encode_continuation(self, text: str, after: int | None = None) -> list[int]:
        """Ids of a text that goes on after other text: those of `encode`, whatever id is before it."""
        return self.encode(text)

    def encode_continuation_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_continuation` of each text."""
        return self.encode_batch(texts)

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids whose text later ids may change: none, since each character is decoded by itself."""
        return frozenset()

    def decode_continuation(self, ids: Iterable[int], after: int | None = None) -> str:
        """Text of ids that go on after others: that of `decode`, whatever id is before them."""
        return self.decode(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens dropped; bytes that are no UTF-8 (a cut character) become U+FFFD.

        Raises DataError on an id outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        outside = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise DataError(f"expected token ids in 0…{self.vocab_size - 1}, got {outside}; is this its tokenizer?")
        # UNK is never encoded but a model may emit it; PAD is dropped by SentencePiece and UNK printed as " ⁇ ".
        return self._processor.decode([PAD if token == UNK else token for token in ids])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, as SentencePiece writes it ("▁the", "<0x0A>", "</s>"): for labels and tables."""
        return [self._processor.id_to_piece(int(token)) for token in ids]


def _open(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"expected a SentencePiece model, got {len(model):,} other bytes; restore the file or train it again"
        ) from error
    specials = {"pad": PAD, "bos": BOS, "eos": EOS, "unk": UNK}
    found = {name: getattr(processor, f"{name}_id")() for name in specials} if processor.get_piece_size() else {}
    if found != specials:
        raise ConfigError(f"expected a tokenizer with special ids {specials}, got {found}; train one with this project")
    for token in ROLE_TOKENS.values():
        if not processor.is_control(processor.piece_to_id(token)):
            raise ConfigError(f"expected a tokenizer with the control symbol {token}, got none; train one with roles")
    return processor


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        check_unicode(text)
        for line in _TRAINING_BREAKS.split(text):
            yield from (line[start : start + _CHUNK] for start in range(0, len(line), _CHUNK))


def _sample(lines: Iterable[str], size: int | None, seed: int) -> list[str]:
    """Reservoir sampling (Vitter's algorithm R), in the order of the corpus."""
    if size is None:
        return list(lines)
    draw = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for place, line in enumerate(lines):
        slot = place if place < size else draw.randrange(place + 1)
        if slot < size:
            kept[slot : slot + 1] = [(place, line)]
    return [line for _, line in sorted(kept)]


def check_unicode(text: str) -> None:
    """Raises DataError on a lone surrogate, which no encoder can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"expected valid Unicode, got the lone surrogate {text[error.start]!r} at character {error.start}; "
            "decode the file as UTF-8"
        ) from error


def _vocabulary_error(error: RuntimeError, vocab_size: int) -> ConfigError | DataError:
    """What SentencePiece's message means for the person who set the vocabulary size."""
    if high := re.search(r"set it to a value <= (\d+)", str(error)):
        return ConfigError(
            f"expected a vocab_size of at most {high[1]} for this corpus, got {vocab_size}; lower it or add text"
        )
    if low := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return ConfigError(
            f"expected a vocab_size of at least {low[1]} (7 special tokens, 256 bytes and the frequent characters of "
            f"this corpus), got {vocab_size}"
        )
    return DataError(f"SentencePiece could not train on this text: {error}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, readable by the owner only."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp creates it as 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
