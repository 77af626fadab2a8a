"""The target of an attempt: sizes that its configuration sets, those that the run had before, and the machine's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from rlhfjax.config import Run
from rlhfjax.config.recipe import TOKENIZER
from rlhfjax.host import processes
from rlhfjax.stages.job import Job
from rlhfjax.target import SIZES, Target, target_of


def first_target(run: Run, mesh: Mesh) -> Target:
    """The target of a run that begins on this mesh: what its configuration leaves open, the machine decides."""
    return target_of(mesh, run.reliability.sizes.model_dump())


def next_target(job: Job, before: Sequence[Mapping[str, Any]]) -> Target:
    """The target of an attempt that goes on with this job after those `before`; reports sizes that it keeps.

    On the platform and the number of devices that it had, a run keeps its sizes whatever this machine would choose, so
    that its programs stay what they were; the configuration alone changes them. Elsewhere the machine decides anew.
    """
    own, given = first_target(job.run, job.mesh), job.run.reliability.sizes.model_dump(exclude_none=True)
    if job.stage == TOKENIZER:  # nothing was computed yet
        return own
    target = target_of(job.mesh, _sizes_before(before, own.platform, job.mesh.size) | given)
    kept = [name for name in SIZES if getattr(target, name) != getattr(own, name)]
    if kept:
        shown = ", ".join(f"{name} {getattr(target, name)} (this machine's own: {getattr(own, name)})" for name in kept)
        job.report(f"{job.stage}: continues with the sizes of the run: {shown}; reliability.sizes sets others")
    return target


def agree_on_sizes(target: Target) -> None:
    """Raise ConfigError in every process where they would not build programs of the same sizes."""
    processes.agree({f"reliability.sizes.{name}": str(getattr(target, name)) for name in SIZES})


def _sizes_before(before: Sequence[Mapping[str, Any]], platform: str, devices: int) -> dict[str, int]:
    """The sizes of the last attempt that noted any, where it ran on as many devices of this platform."""
    last = next((attempt for attempt in reversed(before) if "target" in attempt), None)
    if last is None or (last["target"]["platform"], len(last["devices"])) != (platform, devices):
        return {}
    return {name: last["target"][name] for name in SIZES if name in last["target"]}
