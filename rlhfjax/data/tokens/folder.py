"""A folder of token rows, from its plan to its index: what lies where, and when it is whole.

plan.json           what is to be made, written first
tokenizer/          what the ids are of
rows-…              shards; beside each that is finished, until all are, a file of what is in it
tokens.json         the index: what all of them hold
MANIFEST…           sizes and digests of all of it, written last: a folder that has it is whole
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhfjax import stores
from rlhfjax.data.reading import Tally
from rlhfjax.data.tokens.form import id_type
from rlhfjax.data.tokens.plan import FORMAT, Plan
from rlhfjax.data.tokens.rows import Counts
from rlhfjax.data.tokens.shards import Shard, shard_name
from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.files import write_json
from rlhfjax.integrity import MANIFEST, write_manifest
from rlhfjax.places import expanded
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer

PLAN, INDEX, TOKENIZER = "plan.json", "tokens.json", "tokenizer"


def token_folder(source: str, data_dir: Path) -> Path | None:
    """The folder of token rows that a source names, by its path or by its name in the data directory; finished or not.

    Raises DataError for one that is not finished.
    """
    for folder in (expanded(stores.fetched(source)), expanded(data_dir) / source) if source else ():
        if os.path.isfile(folder / INDEX) and os.path.isfile(folder / MANIFEST):
            return folder
        if os.path.isfile(folder / PLAN) and os.path.isdir(folder / TOKENIZER):
            raise DataError(
                f"{folder}: expected all rows of tokens, got some: their preparation was stopped; run the same "
                "`rlhfjax data prepare` again, which goes on with it"
            )
    return None


def read_plan(folder: Path) -> Plan:
    """The plan of a folder. Raises DataError where there is none that can be read."""
    try:
        return Plan.from_json(json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / PLAN}: expected a plan, got {type(error).__name__}; delete the folder") from None


def tokenizer_of(folder: Path, plan: Plan) -> AnyTokenizer:
    """The tokenizer of a folder with the chat settings of its plan."""
    return load_tokenizer(folder / TOKENIZER).with_chat(ChatSettings.from_json(plan.chat))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, for one preparation at a time. Raises DataError where another has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}; give another one with --to") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it, however the process ends
        yield
    except BlockingIOError:
        raise DataError(f"{folder}: another process is preparing it; wait for that one") from None
    finally:
        os.close(handle)


def begin(folder: Path, plan: Plan, tokenizer: AnyTokenizer) -> None:
    """Write the plan down, or find that it is the one of what is there. Raises DataError where it is not."""
    if not (folder / PLAN).is_file():
        if any(not path.name.endswith(".part") for path in folder.iterdir()):
            raise DataError(f"{folder}: expected an empty folder, got other files in it; give another one with --to")
        write_json(folder / PLAN, plan.to_json())
    there, wanted = read_plan(folder).to_json(), plan.to_json()
    for name in wanted:
        if there[name] != wanted[name]:
            raise DataError(
                f"{folder}: expected what was begun there, {name} {_short(there[name])}, got {_short(wanted[name])}; "
                "give another folder with --to, or delete this one"
            )
    if not (folder / MANIFEST).is_file():
        tokenizer.save(folder / TOKENIZER)
        for unfinished in folder.glob("*.part"):
            unfinished.unlink(missing_ok=True)


def write_index(folder: Path, plan: Plan, shards: Sequence[Shard]) -> None:
    """Write the index. Raises DataError where there is no row at all."""
    counts = sum((shard.counts for shard in shards), Counts())
    if not counts.rows:
        raise DataError(
            f"{plan.source}: expected rows of at most {plan.rows.length} tokens, got none of {counts.records:,} "
            f"records{_left_out(counts)}"
        )
    write_json(folder / INDEX, _index(plan, counts, shards))


def seal(folder: Path) -> None:
    """Remove what is in the index too, and write the manifest."""
    for beside in folder.glob("rows-*.json"):
        beside.unlink()
    shards = read_index(folder)["shards"]
    write_manifest(
        folder, known={shard["file"]: {name: shard[name] for name in ("size", "sha256")} for shard in shards}
    )


def _index(plan: Plan, counts: Counts, shards: Sequence[Shard]) -> dict[str, Any]:
    rows = plan.rows
    made = [rows.kind, rows.packed, rows.length, rows.train_on, plan.tokenizer["sha256"], dict(plan.chat)]
    content = json.dumps([made, [shard.digest for shard in shards]], sort_keys=True)
    return {
        "format": FORMAT,
        "kind": rows.kind,
        "packed": rows.packed,
        "length": rows.length,
        "train_on": rows.train_on,
        "source": plan.source,
        "split": plan.split,
        "tokenizer": dict(plan.tokenizer),
        "chat": dict(plan.chat),
        "ids": id_type(plan.tokenizer["vocab_size"]),
        "counts": vars(counts),
        "made_from": _made_from(plan, shards),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "notes": list(_notes(plan, counts, shards)),
        "shards": [
            {"file": shard_name(shard.number, len(shards)), "rows": shard.counts.rows}
            | {"size": shard.size, "sha256": shard.sha256}
            for shard in shards
            if shard.counts.rows
        ],
    }


def _made_from(plan: Plan, shards: Sequence[Shard]) -> dict[str, Any]:
    """By file the SHA-256 of the digests of its parts; of a dataset its fingerprint."""
    if plan.dataset:
        return {f"{plan.source}@{plan.split}": plan.dataset["fingerprint"]}
    of_files: dict[str, list[str]] = {}
    for part, shard in zip(plan.parts, shards, strict=True):
        of_files.setdefault(str(part.file), []).append(shard.source)
    return {file: hashlib.sha256("".join(digests).encode()).hexdigest() for file, digests in of_files.items()}


def _notes(plan: Plan, counts: Counts, shards: Sequence[Shard]) -> Iterator[str]:
    """What the files were taken for, what of them nobody reads, and what was left out."""
    kind, files = plan.rows.kind, [plan.file(each["path"]) for each in plan.files]
    yield from dict.fromkeys(file.words() for file in files if file.identity())
    total = sum((shard.tally for shard in shards), Tally())
    yield from total.words(kind, files[0].layout.omits(kind) if files else "")
    if left := _left_out(counts):
        yield f"of {counts.records:,} records{left}"
    if counts.equal:
        yield f"{counts.equal:,} comparisons rank equal responses apart; taken as ties"


def _left_out(counts: Counts) -> str:
    rest = {
        "longer than rows may be": counts.overlong,
        "cannot be written": counts.refused,
        "weight 0 alone": counts.untrained,
        "without a preference": counts.undecided,
    }
    said = [f"{count:,} {why}" for why, count in rest.items() if count]
    return f", left out: {', '.join(said)}" if said else ""


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder that is whole. Raises IntegrityError where it cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        known = index["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{folder / INDEX}: expected an index, got {type(error).__name__}; {REMEDY}") from None
    if not known:
        raise DataError(f"{folder / INDEX}: expected format {FORMAT}, got {index['format']}; update rlhfjax")
    return index


REMEDY = "delete the folder, and prepare it again"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | Sequence | int) else str(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
