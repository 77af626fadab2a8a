"""Frequent steps on each host's own disk, beside the checkpoints that last.

Orbax's emergency checkpoints are not used: where no process holds what another does, they keep nothing on the disks.
"""

from rlhfjax.training.local.hosts import require_local_dir
from rlhfjax.training.local.restoring import restored_newest
from rlhfjax.training.local.steps import TOKEN, LocalSteps

__all__ = ["TOKEN", "LocalSteps", "require_local_dir", "restored_newest"]
