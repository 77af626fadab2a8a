"""What each of two processes does for tests/training/test_local_together.py: `python FILE COORDINATOR INDEX FOLDER…`.

In one FOLDER it saves until it is killed; of several it restores from each, and writes what it got.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from rlhfjax.host.processes import Place, started
from rlhfjax.sharding import make_mesh, put, replicated
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.local import LocalSteps, restored_newest
from rlhfjax.training.state import abstract
from training.saving_together import META, models, placed

DURABLE, LAST = 2, 6  # the step of the one checkpoint, and that of the last local step


def state_of(mesh, step):
    params = placed(mesh, models(step))
    return params, (placed(mesh, models(-step)), put(np.int32(step), replicated(mesh)))


def opened(folder, index, report):
    local = LocalSteps(folder / f"disk{index}", 1, folder / "stage", "tiny", report)
    return local, Checkpoints(folder / "stage" / "checkpoints", keep=2, report=report)


def save(mesh, index, folder):
    local, checkpoints = opened(folder, index, print)
    for step in range(1, LAST + 1):
        if index == 0:
            with (folder / "stage" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
        params, training = state_of(mesh, step)
        if step == DURABLE:
            checkpoints.save(step, params, training, META)
            checkpoints.wait()
        else:
            local.save(step, params, training, {"guards": step})
            local.close()  # or the next would be left out
    (folder / f"ready{index}").touch()
    time.sleep(600)


def restore(mesh, index, folder):
    said = []
    local, checkpoints = opened(folder, index, said.append)
    params, training = state_of(mesh, 0)
    restored, is_local = restored_newest(
        checkpoints, local, folder / "stage" / "metrics.jsonl", abstract(params), abstract(training)
    )
    checkpoints.close()
    step = restored[2]["step"]
    wanted = state_of(mesh, step)
    same = all(
        np.array_equal(shard.data, expected.data)
        for found, other in zip(jax.tree.leaves(restored[:2]), jax.tree.leaves(wanted), strict=True)
        for shard, expected in zip(found.addressable_shards, other.addressable_shards, strict=True)
    )
    told = {"step": step, "local": is_local, "same": same, "guards": restored[2].get("guards"), "said": said}
    (folder / f"restored{index}.json").write_text(json.dumps(told))


def main(coordinator, index, folders):
    place = Place(coordinator, 2, index, coordinator)
    with started(place, heartbeat=60, timeout=600, say=print, failed=lambda error: 1):
        mesh = make_mesh(data=1, fsdp=4, tensor=2)
        if len(folders) == 1:
            save(mesh, index, folders[0])
        for folder in folders:
            restore(mesh, index, folder)


if __name__ == "__main__":
    os.environ["RLHFJAX_DEVICES_PER_PROCESS"] = "4"
    main(sys.argv[1], int(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
