"""Facts that a checkpoint holds of itself, places of checkpoints, and their comparison with what was written."""

import base64
import binascii
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhfjax import stores
from rlhfjax.config.recipe import STAGES
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.integrity import MANIFEST, read_manifest, require_part, verified_once, verifying
from rlhfjax.models import SequenceModel
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.loading import AnyTokenizer, tokenizer_from
from rlhfjax.text.tokenizer import Tokenizer

SCALAR = ("reward", "value")  # items with a scalar head
COMPLETE = "complete.json"
FORMAT = 3  # since 2 a step has a manifest, since 3 each item; one of format 1 can only be believed
_SMALL = 1 << 14  # bytes of files that are hashed whenever an item is read
_log = logging.getLogger("rlhfjax")
_told: set[Path] = set()


def meta_of(
    role: str, model: SequenceModel, tokenizer: AnyTokenizer | None, averaged: bool = False, **more: Any
) -> dict[str, Any]:
    """What a checkpoint says of itself: what its model is, and the item that is loaded when nobody asks for another.

    With `averaged` that is the moving average of the parameters.
    """
    packed = None if tokenizer is None else {"kind": tokenizer.kind, "data": _packed(tokenizer.to_bytes())}
    chat = {} if tokenizer is None else {"chat": tokenizer.chat.to_json()}
    names = {"role": role, "serve": "average" if averaged else role}
    return {"format": FORMAT, **names, "model": asdict(model.config), "tokenizer": packed, **chat, **more}


def tokenizer_of(meta: Mapping[str, Any]) -> AnyTokenizer | None:
    """The tokenizer inside a checkpoint's meta; None of a model that came without one and knows ids only.

    It writes conversations as the model was trained on them: with the same date and chat_template_kwargs. Raises
    IntegrityError when it cannot be read.
    """
    packed, chat = meta["tokenizer"], ChatSettings.from_json(meta.get("chat", {}))
    try:
        if packed is None:
            return None
        if isinstance(packed, str):  # as it was written before there were two kinds
            return Tokenizer.from_bytes(base64.b64decode(packed, validate=True))
        data = zlib.decompress(base64.b64decode(packed["data"], validate=True))
        return tokenizer_from(packed["kind"], data).with_chat(chat)
    except (binascii.Error, zlib.error, KeyError, TypeError) as error:
        raise IntegrityError(f"checkpoint: expected a packed tokenizer in its meta, got {error!r}") from error


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def find_checkpoint(path: str | Path) -> Path:
    """The step directory that `path` means: itself, a stage's chosen step, or a run's last policy.

    Raises ConfigError when there is none, IntegrityError when a stage's last mark cannot be read.
    """
    given, path = path, stores.here(path)
    if not path.is_dir():
        raise ConfigError(f"checkpoint: expected a checkpoint, stage or run directory, got {given}, which is not there")
    if (path / "meta").is_dir() or (path.name.isdigit() and path.parent.name == "checkpoints"):
        return path
    if (path / COMPLETE).exists() and (path / "checkpoints").is_dir():
        return path / "checkpoints" / str(_chosen(path / COMPLETE))
    if (path / "checkpoints").is_dir():
        steps = [int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdigit()]
        if steps:
            return path / "checkpoints" / str(max(steps))
    for stage in (facts.name for facts in reversed(STAGES) if facts.role == "policy"):
        if any(entry.name.isdigit() for entry in (path / stage / "checkpoints").glob("*")):
            return find_checkpoint(path / stage)
    raise ConfigError(f"checkpoint: {path} holds no checkpoint; expected {path}/checkpoints/STEP or a run with one")


def _chosen(mark: Path) -> int:
    try:
        return int(json.loads(mark.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{mark}: expected the step that the stage chose, got {type(error).__name__} on reading it; run again "
            f"with --from {mark.parent.name}"
        ) from None


def read_meta(step_dir: Path) -> dict[str, Any]:
    """The meta item of a step directory, which is verified first.

    Raises IntegrityError when it is not what was written, ConfigError when a newer version wrote it.
    """
    verified_item(step_dir, "meta", digests=True)
    return _meta(step_dir)


def verified_item(step_dir: Path, item: str, digests: bool = False) -> bool:
    """Compare an item of a step with its manifest: names, sizes and small files, and with `digests` all contents.

    A step of an older format is compared as a whole. A copy of what an object store has is fetched anew before it is
    called damaged; whether that was done. Raises IntegrityError naming the files that differ.
    """
    if not _has_items(step_dir):
        verified_step(step_dir)
        return False
    folder = step_dir / item
    stores.need(folder)
    if not verifying():
        return False
    try:
        require_part(step_dir, item, _remedy(step_dir), digests, _SMALL)
    except IntegrityError:
        if not stores.mend(folder):
            raise
        require_part(step_dir, item, _remedy(step_dir))
        return True
    return False


def _has_items(step_dir: Path) -> bool:
    """Whether the items of a step have manifests of their own."""
    try:
        manifest = read_manifest(step_dir)
    except IntegrityError:
        if verifying() and not stores.mend(step_dir):
            raise
        manifest = read_manifest(step_dir) if verifying() else None
    return f"meta/{MANIFEST}" in (manifest or {"files": {}})["files"]


def verified_step(step_dir: Path) -> None:
    """Compare a step of format 1 or 2 with its manifest, once in a process.

    Raises IntegrityError naming the files that differ. A step of format 1 has no manifest, which is said once; a later
    one without is damaged, since none is put in its place before its manifest is on the disk.
    """
    stores.need(step_dir)
    if not verifying():
        return
    if (step_dir / MANIFEST).exists():
        _verified(step_dir)
    elif _meta(step_dir).get("format", 1) > 1:
        raise IntegrityError(f"{step_dir}: {MANIFEST} is missing; {_remedy(step_dir)}")
    elif step_dir not in _told:
        _told.add(step_dir)
        _log.warning("%s: no digest, since an older version wrote it; what it holds cannot be checked", step_dir)


def _verified(step_dir: Path) -> None:
    """A copy of what an object store has is fetched anew before it is called damaged."""
    try:
        verified_once(step_dir, _remedy(step_dir))
    except IntegrityError:
        if not stores.mend(step_dir):
            raise
        verified_once(step_dir, _remedy(step_dir))


def _meta(step_dir: Path) -> dict[str, Any]:
    path = step_dir / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        found = int(meta.get("format", 1))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise IntegrityError(f"checkpoint {step_dir} has no readable meta: {error}") from error
    if found > FORMAT:
        raise ConfigError(
            f"checkpoint {step_dir}: expected format {FORMAT} or an older one, got {found}; update rlhfjax"
        )
    return meta


def _remedy(step_dir: Path) -> str:
    stage = step_dir.parent.parent
    if step_dir.parent.name != "checkpoints" or not (stage.parent / "config.yaml").exists():
        return "fetch it again, or use another checkpoint"
    return f"put a copy in its place, or run again with --from {stage.name}"
