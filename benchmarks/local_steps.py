"""How long a state takes to be saved and restored, as a checkpoint and as a local step.

    JAX_PLATFORMS=cpu python -m benchmarks.local_steps CHECKPOINTS LOCAL [MEGABYTES]

CHECKPOINTS and LOCAL are folders to make on the disks that are compared; the state has MEGABYTES (512), in matrices of
16. Takes the time for which saving keeps training waiting, the time until the state is on the disk, and the time to
restore it in a new process, all of it compared with its digests; medians of three, but for the last, which is of one.
Writes benchmarks/results/local_steps.json.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.sharding import make_mesh, put, replicated
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.local import LocalSteps, restored_newest
from rlhfjax.training.state import abstract

RESULT = Path(__file__).with_name("results") / "local_steps.json"
SAVES = 3
Times = dict[str, float]


def main(checkpoints: Path, local: Path, megabytes: int) -> None:
    """Measure both, each in processes of its own."""
    result: dict[str, Any] = {"megabytes": megabytes, "cores": os.cpu_count()}
    for kind, folder in (("checkpoint", checkpoints), ("local", local)):
        folder.mkdir(parents=True)
        times: Times = {}
        for what in ("save", "restore"):
            words = [sys.executable, "-m", "benchmarks.local_steps", kind, str(folder), str(megabytes), what]
            times |= json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
        shutil.rmtree(folder)
        result[kind] = times
        print(f"{kind:>10}", *(f"{name} {seconds:.2f}" for name, seconds in times.items()))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(kind: str, folder: Path, megabytes: int, what: str) -> Times:
    """Of one kind, in this process."""
    mesh = make_mesh(devices=jax.devices()[:1])
    many = max(megabytes // 16, 1)
    params = {str(i): put(jnp.full((4096, 1024), i, jnp.float32), replicated(mesh)) for i in range(many)}
    count = (put(jnp.int32(0), replicated(mesh)),)
    rows = folder / "metrics.jsonl"
    rows.write_text(json.dumps({"step": SAVES}) + "\n", encoding="utf-8")
    steps = LocalSteps(folder / "disk", 1, folder, "state", lambda text: None)
    saver = Checkpoints(folder / "checkpoints", keep=1)
    try:
        if what == "restore":
            shapes = abstract(params)
            params.clear()
            began = time.perf_counter()
            restored, is_local = restored_newest(saver, steps, rows, {"policy": shapes}, abstract(count))
            assert restored
            assert is_local == (kind == "local")
            jax.block_until_ready(restored[0])
            return {"restore_s": time.perf_counter() - began}
        blocked, written = [], []
        for step in range(1, SAVES + 1):
            began = time.perf_counter()
            if kind == "local":
                steps.save(step, {"policy": params}, count, {})
            else:
                saver.save(step, {"policy": params}, count, {"format": 2})
            blocked.append(time.perf_counter() - began)
            steps.close()
            saver.wait()
            written.append(time.perf_counter() - began)
        return {"blocked_s": statistics.median(blocked), "written_s": statistics.median(written)}
    finally:
        saver.close()


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(measured(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int((*sys.argv, "512")[3]))
