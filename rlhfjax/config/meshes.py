"""Meshes of a recipe on so many devices: what they do not fit, and others that would do."""

import math
from collections.abc import Iterator, Mapping
from functools import partial

from rlhfjax.config.recipe import offline, online, sampling
from rlhfjax.config.schema import Run
from rlhfjax.config.sections import Axes, Mesh
from rlhfjax.config.shape import model_shape
from rlhfjax.errors import ConfigError

Sizes = Mapping[str, int]
_SHOWN = 3
_MOST = 2**16  # devices for which meshes are looked for


def mesh_shape(mesh: Axes, devices: int, key: str = "mesh") -> dict[str, int]:
    """Sizes of the mesh axes on `devices` devices; an axis of -1 takes what the others leave.

    Raises ConfigError when the product of the axes cannot be the number of devices, or slices do not split `data`.
    """
    sizes = mesh.axes
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
    if free and devices % fixed:
        raise ConfigError(
            f"{key}: {shown} = {fixed} must divide the number of devices, {devices}; change {key}.* or the devices"
        )
    if not free and fixed != devices:
        raise ConfigError(
            f"{key}: {shown} = {fixed}, expected the number of devices, {devices}; change {key}.* or set one axis to -1"
        )
    found = {axis: devices // fixed if axis in free else size for axis, size in sizes.items()}
    if found["data"] % mesh.slices:
        raise ConfigError(f"{key}.data {found['data']} must be a multiple of {key}.slices {mesh.slices}")
    return found


def least_devices(mesh: Mesh) -> int:
    """The smallest number of devices that the mesh fits, and those of the stages: products, with the least for a -1."""
    return math.lcm(*(_least(axes) for axes in mesh.all.values()))


def _least(mesh: Axes) -> int:
    fixed = math.prod(size for size in mesh.axes.values() if size != -1)
    return fixed * mesh.slices if mesh.data == -1 else fixed


def mesh_problems(run: Run, devices: int, held: Sizes | None = None) -> Iterator[str]:
    """What does not fit the meshes of a recipe on so many devices; the last of a mesh names some that do.

    `held` are the sizes of a model from a checkpoint, where they are known. Raises ConfigError for a mesh that these
    devices cannot make.
    """
    for key, mesh in run.mesh.all.items():
        stages = [name for name, section in run.stages if section and run.mesh.of(name) is mesh]
        if not stages and key != "mesh":
            if (name := key.split(".")[1]) not in type(run.stages).model_fields:
                yield f"{key}: {name} is no stage; expected one of {', '.join(type(run.stages).model_fields)}"
            continue
        held = held or _held(run)
        try:
            found = list(_on_mesh(run, mesh_shape(mesh, devices, key), key, stages, held))
        except ConfigError as error:
            raise ConfigError(f"{error}{_others(run, mesh, devices, key, stages, held)}") from None
        yield from found[:-1]
        for line in found[-1:]:
            yield f"{line}{_others(run, mesh, devices, key, stages, held)}"


def _held(run: Run) -> Sizes:
    if run.model.checkpoint:
        return {}
    shape = model_shape(run.model)
    return {name: getattr(shape, name) for name in ("mlp_width", "width", "experts")}


def _on_mesh(run: Run, mesh: Sizes, key: str, stages: list[str], held: Sizes) -> Iterator[str]:
    yield from _rows(run, mesh, key, stages)
    for stage, name, length in _lengths(run):
        if stage in stages and length % mesh["sequence"]:
            yield f"{name} {length} must be a multiple of {key}.sequence {mesh['sequence']}"
    model = "model.checkpoint: " if run.model.checkpoint else "model."
    for name, axis in (("mlp_width", "tensor"), ("width", "fsdp")):
        if held.get(name, 0) % mesh[axis]:
            yield f"{model}{name} {held[name]} must be a multiple of {key}.{axis} {mesh[axis]}"
    if "experts" in held and not held["experts"] and mesh["expert"] > 1:
        yield f"{key}.expert {mesh['expert']}: this model has no experts to split; use {key}.data or {key}.fsdp"
    elif held.get("experts", 0) % mesh["expert"]:
        count = "experts" if run.model.checkpoint else "architecture.experts.count"
        yield f"{model}{count} {held['experts']} must be a multiple of {key}.expert {mesh['expert']}"


def _rows(run: Run, mesh: Sizes, key: str, stages: list[str]) -> Iterator[str]:
    axes = ["data", "fsdp"] + ["expert"] * (mesh["expert"] > 1)
    rows = math.prod(mesh[axis] for axis in axes)
    names, sizes = " x ".join(f"{key}.{axis}" for axis in axes), " x ".join(f"{mesh[axis]}" for axis in axes)
    for stage, name, size in _batch_sizes(run):
        if stage in stages and size % rows:
            near = " or ".join(f"{size // rows * rows + step:g}" for step in (0, rows) if size // rows * rows + step)
            yield (
                f"{name} {size:g} must be a multiple of {names} = {sizes} = {rows}; make it {near}, or change the mesh"
            )


def _batch_sizes(run: Run) -> Iterator[tuple[str, str, float]]:
    for stage, section in run.stages:
        for key in ("size", "minibatch", "micro"):
            if section and (size := getattr(section.batch, key, None)):
                yield stage, f"stages.{stage}.batch.{key}", size
    for stage, section in online(run):
        if (prompts := section.prompts) != section.batch.size:
            yield stage, f"stages.{stage}.batch.size / groups.size =", prompts
        if section.ptx:
            micro, ratio = section.batch.micro or section.batch.minibatch or section.batch.size, section.ptx.ratio
            yield stage, f"stages.{stage}.ptx.ratio {ratio:g} x micro batch {micro} =", micro * ratio


def sequence_lengths(run: Run) -> Iterator[tuple[str, int]]:
    """Every length in tokens that the model's context must hold, with the name of its key."""
    return ((name, length) for _, name, length in _lengths(run))


def _lengths(run: Run) -> Iterator[tuple[str, str, int]]:
    for stage, section in offline(run):
        yield stage, f"stages.{stage}.batch.length", section.batch.length
    for stage, section in sampling(run):
        prompt, response = section.batch.prompt_length, section.sampling.max_new_tokens
        name = f"stages.{stage}: batch.prompt_length {prompt} + sampling.max_new_tokens {response} ="
        yield stage, name, prompt + response
    for stage, section in online(run):
        if section.ptx:
            yield stage, f"stages.{stage}.ptx.length", section.ptx.length
    if run.stages.evaluate and run.stages.evaluate.losses and not run.model.checkpoint:
        yield "evaluate", "model.context (the length of stages.evaluate.losses)", run.model.context


def meshes_that_fit(run: Run, devices: int) -> Iterator[dict[str, int]]:
    """Other meshes of the recipe's own on so many devices, those most like it first."""
    mesh, held = run.mesh, _held(run)
    stages = [name for name, section in run.stages if section and mesh.of(name) is mesh]
    others = [sizes for sizes in _meshes(devices, mesh.slices) if sizes != mesh.axes]
    fit = (sizes for sizes in others if not any(_on_mesh(run, sizes, "mesh", stages, held)))
    yield from sorted(fit, key=partial(_unlike, mesh.axes))


def _unlike(asked: Sizes, sizes: Sizes) -> tuple[int, float]:
    far = {axis: abs(math.log(sizes[axis] / size)) for axis, size in asked.items() if size != -1}
    return sum(value > 0 for value in far.values()), sum(far.values())


def _others(run: Run, mesh: Axes, devices: int, key: str, stages: list[str], held: Sizes) -> str:
    """Meshes of these devices that fit and are most like the one that was asked for; else of the most that any fits."""
    if devices > _MOST:
        return ""
    for count in (count for count in range(devices, 0, -1) if devices % count == 0):
        fit = [sizes for sizes in _meshes(count, mesh.slices) if not any(_on_mesh(run, sizes, key, stages, held))]
        if fit:
            shown = [" x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "data 1"
                     for sizes in sorted(fit, key=partial(_unlike, mesh.axes))[:_SHOWN]]  # fmt: skip
            none = "" if count == devices else f"no mesh of {devices} devices does; "
            return f" ({none}of {count} {'device' if count == 1 else 'devices'} fit {', '.join(shown)})"
    return ""


def _meshes(devices: int, slices: int) -> Iterator[dict[str, int]]:
    """All meshes of so many devices of which slices split the data axis."""

    divisors = [size for size in range(1, devices + 1) if devices % size == 0]

    def factors(rest: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (rest,)
            return
        for size in (size for size in divisors if rest % size == 0):
            yield from ((size, *others) for others in factors(rest // size, axes - 1))

    for sizes in factors(devices, 5):
        if sizes[0] % slices == 0:
            yield dict(zip(("data", "fsdp", "sequence", "tensor", "expert"), sizes, strict=True))
