"""What is wrong with a recipe on a machine by its numbers alone, and overrides that would do."""

import itertools
import math
from collections.abc import Iterator

from rlhfjax.config import Run, check, sequence_lengths
from rlhfjax.config.meshes import mesh_shape, meshes_that_fit
from rlhfjax.config.recipe import section_of, stages_of
from rlhfjax.config.schema import Tokenizer
from rlhfjax.config.shape import model_shape
from rlhfjax.errors import ConfigError
from rlhfjax.planning.changes import Overrides, changed_by

SHOWN = 3
_MESHES = 200  # of which the first without waste are taken


def arithmetic(run: Run, devices: int, checkpoint: str | None = None) -> None:
    """`config.check` of a recipe with the shape of its model, which comes from a `checkpoint` where one is named.

    Raises ConfigError.
    """
    if checkpoint is None:
        check(run, devices)
        return
    shape = model_shape(run.model)
    model = run.model.model_copy(update={"checkpoint": checkpoint})
    stated = run.model_copy(update={"model": model, "tokenizer": Tokenizer()})
    check(stated, devices, {name: getattr(shape, name) for name in ("mlp_width", "width", "experts")})
    for name, length in sequence_lengths(run):
        if length > run.model.context:
            raise ConfigError(
                f"{name} {length} is more than the context of {checkpoint}, {run.model.context}; shorten it"
            )


def repairs(run: Run, devices: int, slices: int, checkpoint: str | None = None) -> list[Overrides]:
    """The smallest changes after which the arithmetic of a recipe holds on so many devices in so many slices."""
    found: list[Overrides] = []
    for one in _tried(run, devices, slices):
        try:
            changed = changed_by(run, one)
            arithmetic(changed, devices, checkpoint)
        except ConfigError:
            continue
        if not any(wastes(changed, devices)) and one not in found:
            found.append(one)
        if len(found) == SHOWN:
            break
    return found


def _tried(run: Run, devices: int, slices: int) -> Iterator[Overrides]:
    context = tuple(_longer_context(run))
    yield from ((one,) for one in context)
    for laid_out in (run, *_on_slices(run, slices)):
        slicing = () if laid_out is run else (f"mesh.slices={slices}",)
        sizes = tuple(_larger_batches(laid_out, devices))
        yield from (part for part in (sizes, sizes + context) if part)
        for mesh in itertools.islice(meshes_that_fit(laid_out, devices), _MESHES):
            axes = tuple(f"mesh.{axis}={size}" for axis, size in mesh.items())
            yield from (slicing + axes, slicing + axes + context)
    whole = ("mesh.data=-1", *(f"mesh.{axis}=1" for axis in ("fsdp", "sequence", "tensor", "expert")))
    try:
        on_data = changed_by(run, whole)
    except ConfigError:
        return
    yield from (whole, whole + tuple(_larger_batches(on_data, devices)) + context)


def _on_slices(run: Run, slices: int) -> Iterator[Run]:
    if run.mesh.slices != slices:
        yield run.model_copy(update={"mesh": run.mesh.model_copy(update={"slices": slices})})


def _longer_context(run: Run) -> Iterator[str]:
    longest = max((length for _, length in sequence_lengths(run)), default=0)
    if not run.model.checkpoint and longest > run.model.context:
        yield f"model.context={longest}"


def _larger_batches(run: Run, devices: int) -> Iterator[str]:
    """Sizes that are no multiple of the rows of the mesh, at the next one that is."""
    try:
        mesh = mesh_shape(run.mesh, devices)
    except ConfigError:
        return
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    for stage in stages_of(run):
        batch = getattr(section_of(run, stage), "batch", None)
        sizes = {key: size for key in ("micro", "minibatch", "size") if (size := getattr(batch, key, None))}
        unit = rows
        for key, size in sizes.items():  # each divides the next
            unit = math.ceil(size / unit) * unit
            if unit != size:
                yield f"stages.{stage}.batch.{key}={unit}"


def wastes(run: Run, devices: int) -> Iterator[str]:
    """What runs, and has devices do what others do. Raises ConfigError for a mesh that these devices cannot make."""
    if run.model.checkpoint:  # which is here, and brings its shape
        return
    shape, mesh = model_shape(run.model), mesh_shape(run.mesh, devices)
    tensor, split = mesh["tensor"], mesh["tensor"] * mesh["sequence"]
    if shape.heads % tensor:
        yield (
            f"model.heads {shape.heads} is no multiple of mesh.tensor {tensor}: each device computes all heads; make "
            "it one, or change the mesh"
        )
    elif mesh["sequence"] > 1 and shape.heads % split:
        yield (
            f"model.heads {shape.heads} is no multiple of mesh.sequence x mesh.tensor {split}: devices of a sequence "
            "repeat its attention"
        )
    elif shape.kv_heads % tensor:
        yield (
            f"model.kv_heads {shape.kv_heads} is no multiple of mesh.tensor {tensor}: each device holds keys and "
            "values of all heads"
        )
