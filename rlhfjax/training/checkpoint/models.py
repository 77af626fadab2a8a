"""One model of a checkpoint: read alone, on any mesh, and written by itself."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhfjax.errors import IntegrityError
from rlhfjax.fetch import file_sha256
from rlhfjax.host import exchange, processes
from rlhfjax.integrity import MANIFEST
from rlhfjax.models import SequenceModel, compute_dtype, model_of
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.models.lora import init_lora, join
from rlhfjax.sharding import state_shardings
from rlhfjax.training.checkpoint.items import joined, read_item, told_entries
from rlhfjax.training.checkpoint.meta import SCALAR, read_meta
from rlhfjax.training.checkpoint.steps import put_in_place, unfinished
from rlhfjax.training.checkpoint.writing import arguments
from rlhfjax.training.digests import fetched, started
from rlhfjax.types import Params


def save_model(step_dir: Path, item: str, params: Params, meta: Mapping[str, Any]) -> None:
    """Save a model by itself as a step without a training state, in little more memory than it has."""
    write_model(step_dir, item, params, meta, lambda params: fetched(started(params)))


def write_model(
    step_dir: Path, item: str, arrays: Any, meta: Mapping[str, Any], digests: Callable[[Any], Any], **settings: Any
) -> None:
    """`save_model` of arrays in memory, or of others that `settings` of Orbax write; then their `digests` are asked.

    Arrays are files without the database (OCDBT) that would hold a hundred megabytes of them.
    """
    log = logging.getLogger("absl")
    log.addFilter(_not_as_meant)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    settings |= {"save_concurrent_gb": 1.01 * largest / 1e9, "use_ocdbt": False, "use_compression": False}
    handlers = {item: ocp.PyTreeCheckpointHandler(**settings), "meta": ocp.JsonCheckpointHandler()}
    part, turn = unfinished(step_dir), processes.turn_of("saved")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
            writer.save(part, args=arguments({item: arrays}, dict(meta) | {"step": int(step_dir.name)}), force=True)
        found = {item: digests(arrays)}
        told = exchange.collected(turn, told_entries(part, shared=True))
        processes.by_first(lambda: put_in_place(part, step_dir, found, joined(told or [])), "model")
    finally:
        log.removeFilter(_not_as_meant)


def _not_as_meant(record: logging.LogRecord) -> bool:
    """Not that there is no such database to merge, nor that what only keys of jax need is not written."""
    said = record.getMessage()
    unmeant = ("Skipping merge of OCDBT", "ArrayMetadata persistence is disabled", "target_byte_size too small")
    return not any(each in said for each in unmeant)


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
    cannot be read or is not what was written, or when the base is not there or not the one of the training.
    """
    meta = read_meta(step_dir)
    item = str(item or meta["serve"])
    scalar = _scalar(meta, item)
    model = described(meta, dtype=dtype, remat=remat, attention=attention)
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


def model_shapes(step_dir: Path, **here: str) -> tuple[SequenceModel, Params]:
    """The model that a step directory serves, with the shapes of its parameters; adapters are left out.

    No parameter is read. Of `here` are dtype, remat and attention, as `load_model` has them.
    """
    meta = read_meta(step_dir)
    model = described(meta, **here)
    init = model.init_scalar if _scalar(meta, meta["serve"]) else model.init
    return model, jax.eval_shape(init, jax.random.key(0))


def described(
    meta: Mapping[str, Any], *, dtype: str = "auto", remat: str = "none", attention: str = "auto"
) -> SequenceModel:
    """The model that a checkpoint's meta describes, computed as it is here."""
    here = {"dtype": compute_dtype(dtype), "remat": remat, "attention": attention}
    return model_of(meta["model"] | {name: here[name] for name in here if name in meta["model"]})


def _scalar(meta: Mapping[str, Any], item: str) -> bool:
    return (meta["role"] if item == "average" else item) in SCALAR


def reference_to(base_dir: Path, stage_dir: Path) -> dict[str, str]:
    """What the checkpoints of a stage say of the base that their adapters belong to: where it is, and its digest."""
    item = read_meta(base_dir)["serve"]
    path = os.path.relpath(base_dir, stage_dir / "checkpoints" / "0")
    return {"path": path, "item": item, "digest": item_digest(base_dir / item)}


def item_digest(folder: Path) -> str:
    """What stands for all of an item: the SHA-256 of its manifest, or of an older one's files (`tree_digest`)."""
    return file_sha256(folder / MANIFEST) if (folder / MANIFEST).exists() else tree_digest(folder)


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _read_base(step_dir: Path, base: Mapping[str, str], mesh: jax.sharding.Mesh | None, bases: Bases) -> Params:
    place = base_of(step_dir, base, bases)
    return load_model(place[0], mesh, item=place[1], bases=bases)[1]


def base_of(step_dir: Path, base: Mapping[str, str], bases: Bases | None = None) -> tuple[Path, str]:
    """The step directory and item that adapters were trained over.

    Raises IntegrityError where it is not there, or not the one of the training.
    """
    bases = bases or Bases()
    place = Path(os.path.abspath(step_dir / base["path"])), base["item"]
    if not (place[0] / place[1]).is_dir():
        raise IntegrityError(
            f"checkpoint {step_dir} holds adapters of the model in {place[0]}, which is not there; keep the "
            "directories of a run together, or export the model as a whole"
        )
    if place not in bases.digests:
        bases.digests[place] = item_digest(place[0] / place[1])
    if bases.digests[place] != base["digest"]:
        raise IntegrityError(
            f"checkpoint {step_dir}: expected the base with digest {base['digest'][:12]}… in {place[0]}, got "
            f"{bases.digests[place][:12]}…; its adapters belong to another model"
        )
    return place


def _read_item(step_dir: Path, item: str, shapes: Params, mesh: jax.sharding.Mesh | None) -> Params:
    if mesh is None:
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        places = state_shardings(mesh, shapes)
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    return read_item(step_dir, item, target, f"has no readable item {item!r}")
