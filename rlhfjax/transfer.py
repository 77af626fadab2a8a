"""Models of others into checkpoints, and checkpoints into directories that others load."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.files import write_json
from rlhfjax.host import processes
from rlhfjax.interop.exporting import PARITY, export_leaves, parse_size
from rlhfjax.interop.hub import cached_snapshot, is_hub_name
from rlhfjax.interop.huggingface import open_directory
from rlhfjax.interop.pretrained import Imported, Pretrained, load_parameters
from rlhfjax.interop.whole_directories import check_target, shared_directory
from rlhfjax.models import LanguageModel
from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.stages.chat_settings import today
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.training.checkpoint import (
    COMPLETE,
    find_checkpoint,
    meta_of,
    open_leaves,
    read_meta,
    save_leaves,
    save_model,
    tokenizer_of,
)

__all__ = ["export_checkpoint", "export_gguf", "import_model", "lineage", "parse_size"]

ITEMS = ("policy", "average", "value", "reward")


def import_model(source: str, target: Path, *, dtype: str, force: bool, report: Callable[[str], None]) -> None:
    """A checkpoint, laid out as a finished stage, from a Hugging Face directory, a .gguf file or a known name.

    OWNER/NAME is looked for in the hub's cache. One process holds a layer of a parameter at a time. Of several each
    reads, holds and saves the part of the model that its devices have, split over all of them (`fsdp`).

    Raises ConfigError and IntegrityError as reading does; then `target` is as it was.
    """
    check_target(target, COMPLETE, force)
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    opened = _open(source)
    leaves = Imported(opened)
    with shared_directory(target, COMPLETE, force, processes) as part:
        model = LanguageModel(replace(opened.config, dtype="float32"))
        imported = {"name": Path(source).name, "dtype": dtype}
        # What its chat template writes for today stays what it is from now on.
        tokenizer = opened.tokenizer and opened.tokenizer.with_chat(ChatSettings(date=today()))
        meta = meta_of(opened.role, model, tokenizer, imported=imported)
        step_dir = part / "checkpoints" / "0"
        if processes.count() > 1:
            params = load_parameters(opened, make_mesh(data=1, fsdp=-1), dtype)
            save_model(step_dir, opened.role, params, meta)
        else:
            save_leaves(step_dir, opened.role, leaves.tree, leaves, dtype, meta)
        complete = {"stage": "import", "step": 0, "imported": imported}
        processes.by_first(lambda: write_json(part / COMPLETE, complete), "complete")
    for note in opened.notes:
        report(note)
    count = sum(map(math.prod, leaves.shapes.values()))
    report(f"wrote {target} ({opened.config.family}, {count:,} parameters, {opened.role})")


def _open(source: str) -> Pretrained:
    from rlhfjax.interop.gguf import open_gguf
    from rlhfjax.interop.known import KNOWN, known_file

    path = Path(source)
    if source in KNOWN and not path.exists():
        return open_gguf(known_file(source))
    if path.suffix == ".gguf":
        return open_gguf(path)
    if is_hub_name(source):
        snapshot = cached_snapshot(source)
        opened = open_directory(snapshot)
        return replace(opened, notes=(f"{source}: read from the hub's cache, {snapshot}", *opened.notes))
    return open_directory(path)


def export_checkpoint(
    checkpoint: str, target: Path, *, item: str | None, dtype: str, shard_size: int, force: bool
) -> dict[str, Any]:
    """A Hugging Face directory from a checkpoint, with its lineage in the card; the certificate of parity.

    No model is read whole: a tensor at a time is written, and then a layer computed, whatever mesh saved it. Several
    processes write files of weights at the same time.
    """
    check_target(target, PARITY, force)
    with _opened(checkpoint, target, item) as (what, model, leaves, tokenizer, origin):
        settings = {"dtype": dtype, "shard_size": shard_size, "force": force, "lineage": origin}
        return export_leaves(target, what, model, leaves, tokenizer, peers=processes, **settings)


def export_gguf(checkpoint: str, target: Path, *, item: str | None, quantize: str, force: bool) -> dict[str, Any]:
    """A policy of a checkpoint as one GGUF file, with its lineage; what was found when it was read back."""
    from rlhfjax.interop.gguf_export import export_gguf

    with _opened(checkpoint, target, item) as (_, model, leaves, tokenizer, origin):
        return export_gguf(target, model, leaves, tokenizer, quantize=quantize, force=force, lineage=origin)


@contextmanager
def _opened(checkpoint: str, target: Path, item: str | None) -> Iterator[tuple[str, Any, Any, Any, dict[str, Any]]]:
    """An item of a checkpoint: its name, its model, its leaves, the tokenizer and the lineage."""
    step_dir = find_checkpoint(checkpoint)
    meta = read_meta(step_dir)
    held = [name for name in ITEMS if (step_dir / name).is_dir()]
    what = item or meta["serve"]
    if what not in held:
        raise ConfigError(f"--item: expected one of {', '.join(held)} (what {step_dir} holds), got {what!r}")
    model, leaves = open_leaves(step_dir, what, scratch=Path(os.path.abspath(target)).parent)
    with closing(leaves):
        yield what, model, leaves, tokenizer_of(meta), lineage(step_dir)


def lineage(step_dir: Path) -> dict[str, dict[str, Any]]:
    """Where a checkpoint comes from, as headings and facts: its stage, its run, its data by name, its figures.

    Names of data are those of datasets, or of files without the folders they are in; texts are nowhere in it.
    """
    stage_dir = step_dir.parent.parent
    complete, run = _json_lines(stage_dir / COMPLETE), _json_lines(stage_dir.parent / "manifest.jsonl")
    done = (complete or [{}])[-1]
    attempt = (run or [{}])[-1] if "imported" not in done else {}
    origin: dict[str, Any] = {"stage": done.get("stage", stage_dir.name), "step": int(step_dir.name)}
    if "imported" in done:
        origin |= {"imported from": done["imported"]["name"]}
    if attempt:
        origin |= {
            "run": attempt.get("config", {}).get("name"),
            "seed": attempt.get("seed"),
            "configuration (SHA-256)": attempt.get("config_hash"),
            "code": (attempt.get("git") or {}).get("sha"),
            "parent checkpoints": attempt.get("started_from") or None,
        }
    figures = {name: value for name, value in done.items() if isinstance(value, float) and "/" in name}
    data = {_public(name): digest for name, digest in sorted((attempt.get("data") or {}).items())}
    spoken = read_meta(step_dir).get("chat", {})
    return {
        "Lineage": {name: value for name, value in origin.items() if value is not None},
        # A template that writes today's date, or reads variables, was given these.
        "Given to the chat template": {name: value for name, value in spoken.items() if value},
        "Data of the run (fingerprints)": data,
        "Figures": figures,
    }


def _public(name: str) -> str:
    """SOURCE@SPLIT without the folders of a file; names of datasets stay, such as movies/chat."""
    source, _, split = name.rpartition("@")
    is_file = source.startswith(("/", ".", "~")) or source.endswith(".jsonl")
    return f"{Path(source).name if is_file else source}@{split}"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON of a file, or of each of its lines; nothing where there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
