"""What each of two processes does for tests/training/test_saving_together.py: `python FILE COORDINATOR INDEX FOLDER`.

It saves step after step, until it is killed.
"""

import itertools
import os
import sys
from pathlib import Path

import jax
import numpy as np
from tiny import params_of, scalar_params_of, tiny

from rlhfjax.host.processes import Place, started
from rlhfjax.sharding import make_mesh, put, replicated, state_shardings
from rlhfjax.training.checkpoint import Checkpoints

MODEL = tiny("llama-gqa", tied=False)
META = {"format": 2, "role": "policy"}


def placed(mesh, params):
    return jax.tree.map(put, params, state_shardings(mesh, params))


def models(step: int):
    """The two models of a step, whole on the host: other numbers at each step."""
    params = {"policy": params_of(MODEL), "value": scalar_params_of(MODEL, seed=1)}
    return jax.tree.map(lambda x: x + step, params)


def main(coordinator, index, folder):
    with started(
        Place(coordinator, 2, index, coordinator), heartbeat=60, timeout=600, say=print, failed=lambda error: 1
    ):
        mesh = make_mesh(data=1, fsdp=4, tensor=2)
        checkpoints = Checkpoints(Path(folder), keep=2)
        for step in itertools.count(1):
            params = placed(mesh, models(step))
            moments = placed(mesh, models(-step))
            checkpoints.save(step, params, (moments, put(np.int32(step), replicated(mesh))), META)
            checkpoints.wait()


if __name__ == "__main__":
    os.environ["RLHFJAX_DEVICES_PER_PROCESS"] = "4"
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
