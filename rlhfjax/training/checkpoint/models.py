"""One model of a checkpoint: read alone, on any mesh, and written by itself."""

import hashlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhfjax.errors import IntegrityError
from rlhfjax.fetch import file_sha256
from rlhfjax.host import processes
from rlhfjax.integrity import verifying
from rlhfjax.models import SequenceModel, compute_dtype, model_of
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.models.lora import init_lora, join
from rlhfjax.plain_json import plain
from rlhfjax.sharding import state_shardings
from rlhfjax.training.checkpoint.chunks import chunks_of
from rlhfjax.training.checkpoint.meta import SCALAR, read_meta, stored_digests
from rlhfjax.training.checkpoint.steps import put_in_place, unfinished
from rlhfjax.training.digests import different_leaves, fetched, started
from rlhfjax.types import Params

_BUGS = (MemoryError, jax.errors.JaxRuntimeError)  # of this machine, not of what was read


def save_model(step_dir: Path, item: str, params: Params, meta: Mapping[str, Any]) -> None:
    """Save a model by itself as a step without a training state, in little more memory than it has.

    Orbax keeps every array that it compresses until it is written, so arrays are written in small pieces, without the
    database (OCDBT) whose cache would hold a hundred megabytes of them.
    """
    write_model(step_dir, item, params, meta, lambda params: fetched(started(params)))


def write_model(
    step_dir: Path, item: str, arrays: Any, meta: Mapping[str, Any], digests: Callable[[Any], Any], **settings: Any
) -> None:
    """`save_model` of arrays in memory, or of others that `settings` of Orbax write; then their `digests` are asked."""
    log = logging.getLogger("absl")
    log.addFilter(_not_as_meant)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    pieces = chunks_of(arrays, smallest=2 << 20)
    handlers = {
        item: ocp.PyTreeCheckpointHandler(save_concurrent_gb=1.01 * largest / 1e9, use_ocdbt=False, **settings),  # pyright: ignore[reportArgumentType]
        "meta": ocp.JsonCheckpointHandler(),
    }
    items = {
        item: ocp.args.PyTreeSave(arrays, save_args=pieces),
        "meta": ocp.args.JsonSave(plain(dict(meta) | {"step": int(step_dir.name)})),
    }
    part = unfinished(step_dir)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
            writer.save(part, args=ocp.args.Composite(**items), force=True)
        found = {item: digests(arrays)}
        processes.by_first(lambda: put_in_place(part, step_dir, found), "model")
    finally:
        log.removeFilter(_not_as_meant)


def _not_as_meant(record: logging.LogRecord) -> bool:
    """Not that there is no such database to merge, nor that what only keys of jax need is not written."""
    said = record.getMessage()
    return not any(each in said for each in ("Skipping merge of OCDBT", "ArrayMetadata persistence is disabled"))


def _not_about_failed_reads(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    frames = [] if trace is None else [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return not any("orbax" in name for name in [record.getMessage(), *frames])


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
    return {"path": path, "item": item, "digest": tree_digest(base_dir / item)}


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def require_leaves(step_dir: Path, item: str, tree: Any, digests: Mapping[str, Mapping[str, str]]) -> None:
    """Raises IntegrityError unless the arrays that were read are those that were saved, however they lie."""
    if item not in digests or not verifying():
        return
    if different := different_leaves(tree, digests[item]):
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise IntegrityError(
            f"checkpoint {step_dir}: expected {item}/{different[0]} as it was saved, got other bits{more}; its files "
            "are whole, so reading them went wrong: try once more, and then on another machine"
        )


def unreadable(step_dir: Path, what: str, error: Exception) -> Exception:
    """What to raise for an error of Orbax: IntegrityError in one line, unless the error is not about the files."""
    if isinstance(error, _BUGS):
        return error
    # Of the other arrays that were being read, asyncio would log a page each, at some time later, and of those that
    # were still to be read Python would warn.
    logging.getLogger("asyncio").addFilter(_not_about_failed_reads)
    warnings.filterwarnings("ignore", "coroutine '_read_array_index_and_device_put' was never awaited", RuntimeWarning)
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return IntegrityError(f"checkpoint {step_dir} {what}: {said[:300]}")


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
        bases.digests[place] = tree_digest(place[0] / place[1])
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
    try:
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore((step_dir / item).absolute(), target)
    except Exception as error:  # Orbax parses the files of others here, and raises whatever its parsers raise
        raise unreadable(step_dir, f"has no readable item {item!r}", error) from error
    require_leaves(step_dir, item, params, stored_digests(step_dir))
    return params
