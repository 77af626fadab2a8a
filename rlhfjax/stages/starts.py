"""What a stage starts from, whoever has it: a run with its files, or the shapes of one that is not there yet."""

from pathlib import Path
from typing import Protocol

import jax

from rlhfjax.models import SequenceModel
from rlhfjax.types import Params

Started = tuple[SequenceModel, Params]


class Starts(Protocol):
    """Models with their parameters, which may be shapes, and keys of random numbers."""

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
