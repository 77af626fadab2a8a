"""Prepared rows of tokens as a run reads them: by index, from shards that are opened when a row of theirs is wanted.

Nothing is held but the index, a line for each shard, and the places of rows in the shards that were read last.
"""

import shlex
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from rlhfjax.data.records import PROMPTED
from rlhfjax.data.tokens.folder import REMEDY, read_index
from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.integrity import require_intact, verifying
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import AnyTokenizer

_OPEN = 64  # shards at a time
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"
_BUFFER = 1 << 15
_SMALL = 1 << 16


@dataclass(frozen=True)
class Use:
    """What a run does with rows: its `tokenizer`, which lies at `place`, and how it reads them.

    Rows have at most `length` tokens, the value of `setting`, or exactly so many where they are `packed`; None takes
    them as they are. `train_on` is which answers it trains on (None: it asks for none). `drops` are the options of a
    preparation that leaves out what the run would leave out.
    """

    name: str
    tokenizer: AnyTokenizer
    place: str
    length: int | None = None
    setting: str = "batch.length"
    packed: bool | None = None
    train_on: str | None = None
    drops: tuple[str, ...] = ()


class TokenShards:
    """The rows of a folder as bytes, one at a time; `facts` are what its index says.

    Raises IntegrityError for files that are not what was written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if verifying():
            require_intact(folder, REMEDY, digests=False, small=_SMALL)
        self.facts = read_index(folder)
        self.kind: str = self.facts["kind"]
        self.ids: str = self.facts["ids"]
        self._files = [shard["file"] for shard in self.facts["shards"]]
        self._ends = np.cumsum([shard["rows"] for shard in self.facts["shards"]])
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def notes(self) -> list[str]:
        """What was said when the rows were prepared."""
        return self.facts["notes"]

    @property
    def forms(self) -> set[str]:
        """Whether prompts are `messages`, `plain`, or both; nothing of documents."""
        counts = self.facts["counts"]
        if self.kind not in PROMPTED:
            return set()
        whole = ({"messages"} if counts["messages"] else set()) | {"plain"}
        return whole - ({"plain"} if counts["messages"] == counts["records"] else set())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, and of how they were made."""
        return self.facts["sha256"]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: Any) -> Any:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        try:
            (data,) = self._reader(shard).read([row - first])
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._broken(shard, error) from None
        return data

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                path, rows = self.folder / self._files[shard], self.facts["shards"][shard]["rows"]
                reader = ArrayRecordReader(str(path), options=_OPTIONS, file_reader_buffer_size=_BUFFER)
                if reader.num_records() != rows:
                    raise ValueError(f"{reader.num_records()} rows in place of {rows}")
                self._readers[shard] = reader
                if len(self._readers) > _OPEN:
                    self._readers.popitem(last=False)  # whoever still reads it has it
            self._readers.move_to_end(shard)
            return self._readers[shard]

    def _broken(self, shard: int, error: Exception) -> IntegrityError:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return IntegrityError(f"{self.folder / self._files[shard]}: expected intact rows, got {said}; {REMEDY}")

    def require(self, use: Use) -> None:
        """Raises DataError where these rows are not what a run would make of their source, with the command for it."""
        made, asked = self.facts["tokenizer"]["sha256"], use.tokenizer.fingerprint
        if made != asked:
            raise self._other(use, f"rows of the tokenizer {asked[:12]}… ({use.place})", f"rows of {made[:12]}…")
        self._require_chat(use)
        if use.train_on and use.train_on != self.facts["train_on"]:
            raise self._other(use, f"loss.train_on: {use.train_on}", f"targets of train_on {self.facts['train_on']}")
        packed, length = self.facts["packed"], self.facts["length"]
        if use.packed is not None and use.packed != packed:
            words = {True: "packed rows", False: "rows that are not packed"}
            raise self._other(use, f"{words[use.packed]} (batch.pack)", words[packed])
        if packed and use.length and length != use.length:
            raise self._other(use, f"rows packed to {use.length} tokens ({use.setting})", f"rows packed to {length}")
        if not packed and use.length and self.facts["counts"]["longest"] > use.length:
            longest = self.facts["counts"]["longest"]
            raise self._other(use, f"at most {use.length} tokens in a row ({use.setting})", f"{longest} in the longest")

    def _require_chat(self, use: Use) -> None:
        """Conversations must have been written with the variables, and the date, that the run would write them with."""
        template = use.tokenizer.chat_template if isinstance(use.tokenizer, HuggingFaceTokenizer) else None
        if template is None or not self.facts["counts"]["messages"]:
            return
        made, asked = dict(self.facts["chat"]), use.tokenizer.chat.to_json()
        if "strftime_now" not in template.source:
            made["date"] = asked["date"] = None
        if made != asked:
            raise self._other(use, f"conversations written with {asked}", f"with {made}")

    def _other(self, use: Use, expected: str, got: str) -> DataError:
        return DataError(f"{use.name}: expected {expected}, got {got} in {self.folder}; run `{self.command(use)}`")

    def command(self, use: Use) -> str:
        """What makes the rows that a run asks for of the same source."""
        facts = self.facts
        source = facts["source"] + (f"@{facts['split']}" if facts["split"] != "train" else "")
        packed = facts["packed"] if use.packed is None else use.packed
        words = ["rlhfjax", "data", "prepare", source, "--kind", self.kind, "--tokenizer", use.place]
        words += ["--pack" if packed else "--length", str(use.length or facts["length"])]
        train_on = use.train_on or facts["train_on"]
        words += ["--train-on", train_on] if train_on != "last" else []
        words += [word for option in use.drops for word in (option, "drop")]
        if self.forms == {"plain"} or not isinstance(use.tokenizer, HuggingFaceTokenizer):
            return shlex.join(words)
        chat = use.tokenizer.chat.to_json()
        for name, value in chat["chat_template_kwargs"].items():
            words += ["--template", f"{name}={value}"]
        words += ["--date", chat["date"]] if chat["date"] else []
        return shlex.join(words)
