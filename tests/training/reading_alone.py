"""What each process does for tests/training/test_bytes_read.py: `python FILE FOLDER COORDINATOR COUNT INDEX`.

It reads the policy of a step as PPO begins, on a mesh over all processes, and prints what the system counted of it and
how many bytes its devices hold.
"""

import json
import os
import sys
from pathlib import Path

import jax

from rlhfjax.host.processes import Place, started
from rlhfjax.sharding import make_mesh
from rlhfjax.training.checkpoint import load_model


def counted() -> int:
    """Bytes that this process was given by `read` so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def main(folder: str, coordinator: str, count: int, index: int) -> None:
    place = Place(coordinator, count, index, coordinator) if count > 1 else None
    with started(place, heartbeat=60, timeout=600, say=print, failed=lambda error: 1):
        mesh = make_mesh(data=1, fsdp=count)
        load_model(Path(folder), mesh, item="value")  # what is imported and compiled for it
        before = counted()
        params = load_model(Path(folder), mesh, item="policy")[1]
        read = counted() - before
        shards = (shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
        print(json.dumps({"read": read, "held": sum(shards)}), flush=True)


if __name__ == "__main__":
    os.environ["RLHFJAX_DEVICES_PER_PROCESS"] = "1"
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
