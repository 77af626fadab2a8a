"""What a stage starts from, whoever has it: a run with its files, or the shapes of one that is not there yet."""

from pathlib import Path
from typing import Literal, Protocol

import jax

from rlhfjax.config.schema import Run
from rlhfjax.host_memory import require_host_memory, to_host
from rlhfjax.models import SequenceModel
from rlhfjax.models.lora import has_adapters
from rlhfjax.types import Params

Started = tuple[SequenceModel, Params]


def offloads(run: Run, stage: str, mesh: jax.sharding.Mesh, what: Literal["moments", "frozen"]) -> bool:
    """As `Starts` has it."""
    wanted = run.mesh.of(stage).offloads(what)
    if wanted:
        require_host_memory(list(mesh.devices.flat), f"stages.{stage}.mesh" if stage in run.mesh.stages else "mesh")
    return wanted


def at_rest(params: Params, offload: bool) -> Params:
    """Parameters that nothing trains where they lie between two passes.

    With adapters they stay as they are: their base is shared with what trains.
    """
    return to_host(params) if offload and not has_adapters(params) else params


class Starts(Protocol):
    """Models with their parameters, which may be shapes, and keys of random numbers."""

    def offloads(self, what: Literal["moments", "frozen"]) -> bool:
        """Whether that lies in the hosts' memory while no program of the stage reads it.

        Raises ConfigError where the devices cannot read it there.
        """
        ...

    def key(self, use: str) -> jax.Array:
        """A key of its own for each use in each stage."""
        ...

    def policy_from(self, *stages: str) -> Started:
        """The policy of the first of `stages` that the recipe has; else the model's checkpoint; else a fresh one.

        Where none are given, they are those that this stage starts from. With `model.lora` it holds adapters, fresh
        ones where that policy has none; pretraining has no use for them.
        """
        ...

    def load(self, stage: str) -> Started:
        """The model that an earlier stage of this run left."""
        ...

    def load_from(self, path: Path | str) -> Started:
        """The model of a checkpoint anywhere."""
        ...
