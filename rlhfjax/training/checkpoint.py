"""Checkpoints: the only place that knows Orbax.

A step directory holds one item a model (`policy`, `value`, `reward`, `average`), so that each can be read alone, the
`training` state, the tokenizer, and `meta`: what is needed to build the models again.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.fetch import file_sha256
from rlhfjax.models import SequenceModel, compute_dtype, model_of
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.models.lora import init_lora, join
from rlhfjax.sharding import state_shardings
from rlhfjax.text.loading import AnyTokenizer, tokenizer_from
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.types import Params

STAGES = ("ppo", "dpo", "sft", "pretrain")  # which stage of a run holds its last policy, newest first
SCALAR = ("reward", "value")  # items with a scalar head
COMPLETE = "complete.json"


class Checkpoints:
    """The checkpoints of one stage; saving is asynchronous, `close` waits for the last one.

    The newest `keep` stay, and with `keep_best` also the one with the highest score.
    """

    def __init__(self, directory: Path, keep: int, keep_best: bool = False):
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if keep_best:
            policies.append(
                preservation_policy.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            best_fn=_score if keep_best else None,
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest score; the newest one where scores are not kept."""
        return self._manager.best_step()

    def save(
        self, step: int, models: Mapping[str, Any], training: Any, meta: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Save a step; an error of an earlier asynchronous save is raised here."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in models.items()}
        args = ocp.args.Composite(
            **items, training=ocp.args.StandardSave(training), meta=ocp.args.JsonSave(dict(meta) | {"step": step})
        )
        with _uninterrupted():
            self._manager.save(step, args=args, force=True, metrics=None if score is None else {"score": score})

    def restore(
        self, step: int, models: Mapping[str, Any], training: Any
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Models, training state and meta of a step, in the shapes and shardings of the given abstract trees."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in models.items()}
        args = ocp.args.Composite(**items, training=ocp.args.StandardRestore(training), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise IntegrityError(f"checkpoint {self._manager.directory / str(step)} cannot be read: {error}") from error
        return {name: restored[name] for name in models}, restored["training"], restored["meta"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        with _uninterrupted():
            self._manager.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the save that is under way; the second one does not.

    Inside Orbax it would be logged as a failed save, traceback and all.
    """
    main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = []

    def remember(*_: Any) -> None:
        pressed.append(True)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, remember)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def save_model(step_dir: Path, item: str, params: Params, meta: Mapping[str, Any]) -> None:
    """Save a model by itself as a step without a training state, in little more memory than it has.

    Orbax keeps every array that it compresses until it is written, so arrays are written in small pieces, without the
    database (OCDBT) whose cache would hold a hundred megabytes of them.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    pieces = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=max(leaf.nbytes // 64, 2 << 20)), params)
    handlers = {
        item: ocp.PyTreeCheckpointHandler(save_concurrent_gb=1.01 * largest / 1e9, use_ocdbt=False),  # pyright: ignore[reportArgumentType]
        "meta": ocp.JsonCheckpointHandler(),
    }
    items = {
        item: ocp.args.PyTreeSave(params, save_args=pieces),
        "meta": ocp.args.JsonSave(dict(meta) | {"step": int(step_dir.name)}),
    }
    log = logging.getLogger("absl")
    log.addFilter(_not_about_merging)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
            writer.save(step_dir.absolute(), args=ocp.args.Composite(**items))
    finally:
        log.removeFilter(_not_about_merging)


def _not_about_merging(record: logging.LogRecord) -> bool:
    return "Skipping merge of OCDBT" not in record.getMessage()  # there is no such database here to merge


def meta_of(
    role: str, model: SequenceModel, tokenizer: AnyTokenizer | None, averaged: bool = False, **more: Any
) -> dict[str, Any]:
    """What a checkpoint says of itself: what its model is, and the item that is loaded when nobody asks for another.

    With `averaged` that is the moving average of the parameters.
    """
    packed = None if tokenizer is None else {"kind": tokenizer.kind, "data": _packed(tokenizer.to_bytes())}
    names = {"role": role, "serve": "average" if averaged else role}
    return {"format": 1, **names, "model": asdict(model.config), "tokenizer": packed, **more}


def tokenizer_of(meta: Mapping[str, Any]) -> AnyTokenizer | None:
    """The tokenizer inside a checkpoint's meta; None of a model that came without one and knows ids only.

    Raises IntegrityError when it cannot be read.
    """
    packed = meta["tokenizer"]
    try:
        if packed is None:
            return None
        if isinstance(packed, str):  # as it was written before there were two kinds
            return Tokenizer.from_bytes(base64.b64decode(packed, validate=True))
        return tokenizer_from(packed["kind"], zlib.decompress(base64.b64decode(packed["data"], validate=True)))
    except (binascii.Error, zlib.error, KeyError, TypeError) as error:
        raise IntegrityError(f"checkpoint: expected a packed tokenizer in its meta, got {error!r}") from error


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def find_checkpoint(path: str | Path) -> Path:
    """The step directory that `path` means: itself, a stage's chosen step, or a run's last policy.

    Raises ConfigError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"checkpoint: expected a checkpoint, stage or run directory, got {path}, which is not there")
    if (path / "meta").is_dir() and (path / "_CHECKPOINT_METADATA").exists():
        return path
    if (path / COMPLETE).exists() and (path / "checkpoints").is_dir():
        return path / "checkpoints" / str(json.loads((path / COMPLETE).read_text())["step"])
    if (path / "checkpoints").is_dir():
        steps = [int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdigit()]
        if steps:
            return path / "checkpoints" / str(max(steps))
    for stage in STAGES:
        if any(entry.name.isdigit() for entry in (path / stage / "checkpoints").glob("*")):
            return find_checkpoint(path / stage)
    raise ConfigError(f"checkpoint: {path} holds no checkpoint; expected {path}/checkpoints/STEP or a run with one")


def read_meta(step_dir: Path) -> dict[str, Any]:
    """The meta item of a step directory."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore((step_dir / "meta").absolute())
    except (ValueError, FileNotFoundError, json.JSONDecodeError) as error:
        raise IntegrityError(f"checkpoint {step_dir} has no readable meta: {error}") from error


@dataclass(frozen=True)
class Bases:
    """Models without adapters that were read, by step directory and item: models over one base share its arrays."""

    params: dict[tuple[Path, str], Params] = field(default_factory=dict)
    digests: dict[tuple[Path, str], str] = field(default_factory=dict)


def load_model(
    step_dir: Path,
    mesh: jax.sharding.Mesh | None = None,
    *,
    item: str | None = None,
    dtype: str = "auto",
    remat: str = "none",
    attention: str = "auto",
    bases: Bases | None = None,
) -> tuple[SequenceModel, Params]:
    """A model of a step directory and its parameters, laid out on the mesh, or on the default device without one.

    `item` is policy, average, value or reward; by default the one that the checkpoint serves. Adapters are joined with
    the base that they were trained over; what `bases` holds is not read again. Raises IntegrityError when a model
    cannot be read, or when the base is not there or not the one of the training.
    """
    meta = read_meta(step_dir)
    item = str(item or meta["serve"])
    scalar = (meta["role"] if item == "average" else item) in SCALAR
    here = {"dtype": compute_dtype(dtype), "remat": remat, "attention": attention}
    model = model_of(meta["model"] | {name: here[name] for name in here if name in meta["model"]})
    place = (Path(os.path.abspath(step_dir)), item)
    if bases and place in bases.params:
        return model, bases.params[place]
    if lora := meta.get("lora"):
        frozen = _read_base(step_dir, meta["base"], mesh, bases or Bases())
        trained = jax.eval_shape(lambda key: init_lora(key, frozen, lora["rank"], lora["targets"]), jax.random.key(0))
        if scalar:
            head = jax.eval_shape(lambda: zero_head(model.config.width))
            frozen, trained = {"decoder": with_head(frozen, head)["decoder"]}, with_head(trained, head)
        return model, join(frozen, _read_item(step_dir, item, trained, mesh))
    shapes = jax.eval_shape(model.init_scalar if scalar else model.init, jax.random.key(0))
    params = _read_item(step_dir, item, shapes, mesh)
    if bases:
        bases.params[place] = params
    return model, params


def reference_to(base_dir: Path, stage_dir: Path) -> dict[str, str]:
    """What the checkpoints of a stage say of the base that their adapters belong to: where it is, and its digest."""
    item = read_meta(base_dir)["serve"]
    path = os.path.relpath(base_dir, stage_dir / "checkpoints" / "0")
    return {"path": path, "item": item, "digest": tree_digest(base_dir / item)}


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _read_base(step_dir: Path, base: Mapping[str, str], mesh: jax.sharding.Mesh | None, bases: Bases) -> Params:
    place = Path(os.path.abspath(step_dir / base["path"])), base["item"]
    if not (place[0] / place[1]).is_dir():
        raise IntegrityError(
            f"checkpoint {step_dir} holds adapters of the model in {place[0]}, which is not there; keep the "
            "directories of a run together, or export the model as a whole"
        )
    if place not in bases.digests:
        bases.digests[place] = tree_digest(place[0] / place[1])
    if bases.digests[place] != base["digest"]:
        raise IntegrityError(
            f"checkpoint {step_dir}: expected the base with digest {base['digest'][:12]}… in {place[0]}, got "
            f"{bases.digests[place][:12]}…; its adapters belong to another model"
        )
    return load_model(place[0], mesh, item=place[1], bases=bases)[1]


def _read_item(step_dir: Path, item: str, shapes: Params, mesh: jax.sharding.Mesh | None) -> Params:
    if mesh is None:
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        places = state_shardings(mesh, shapes)
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore((step_dir / item).absolute(), target)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise IntegrityError(f"checkpoint {step_dir} has no readable item {item!r}: {error}") from error
