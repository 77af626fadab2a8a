"""What each of two processes does for tests/sharding/test_two_processes.py: `python FILE COORDINATOR INDEX`."""

import json
import os
import sys

import jax
import numpy as np

from rlhfjax.data.by_step import Batches
from rlhfjax.errors import ConfigError, DataError, RlhfjaxError
from rlhfjax.host import processes
from rlhfjax.host.processes import Place, agree, by_first, fetch, is_first, started
from rlhfjax.sharding import local_rows, make_mesh, place_share, put, replicated
from rlhfjax.types import TokenBatch
from sharding.groups import on_mesh

ROWS, SIZE, LENGTH = 96, 8, 6


class Recorder:
    """Rows of which each is known by its tokens, and which of them were read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, row):
        self.read.append(row)
        tokens = np.arange(LENGTH, dtype=np.int32) + 100 * row
        return {"tokens": tokens, "segments": tokens + 1, "positions": tokens + 2, "loss_mask": tokens % 2 == 0}


def batches_of(mesh, step):
    """Rows that this process read for a batch, and the whole batch as every process sees it."""
    source = Recorder()
    batches = Batches(source, TokenBatch, ROWS, SIZE, local_rows(mesh, SIZE))
    placed = place_share(mesh, batches[step])
    return {"read": source.read, "batch": fetch(placed).tokens.tolist(), "shape": placed.tokens.shape}


def told(what, *arguments):
    """What an error says, or nothing."""
    try:
        what(*arguments)
    except RlhfjaxError as error:
        return [type(error).__name__, str(error), processes._everywhere(error)]
    return None


def fails():
    raise DataError("file.jsonl:3: wrong")


def main(coordinator, index):
    place, report = Place(coordinator, 2, index, coordinator), {}
    with started(place, heartbeat=60, timeout=600, say=print, failed=lambda error: 1):
        report["devices"] = [jax.device_count(), jax.local_device_count()]
        report["first"] = is_first()
        for name, axes in {"data": (4,), "fsdp": (2, 2), "tensor": (1, 1, 1, 4), "sequence": (2, 1, 2)}.items():
            report[name] = [batches_of(make_mesh(*axes), step) for step in (0, 5)]
        report["equal"] = told(agree, {"a": "1"})
        report["unequal"] = told(agree, {"a": "1", "code": f"c{index}"}, ConfigError)
        report["one fails"] = told(by_first, fails, "x")
        report["one works"] = told(by_first, lambda: None, "x")
        whole = put(np.arange(4.0), replicated(make_mesh(4)))
        report["sum"] = float(jax.jit(lambda x: x.sum())(whole))
        report["groups"] = on_mesh(make_mesh(2, 2))
        report["preempted"] = [processes.preempted() for _ in range(3)]
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    os.environ["RLHFJAX_DEVICES_PER_PROCESS"] = "2"
    main(sys.argv[1], int(sys.argv[2]))
