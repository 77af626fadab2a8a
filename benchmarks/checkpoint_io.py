"""What a step of 1 GB takes: saved and restored against raw files, and what processes read of it at the start of PPO.

    JAX_PLATFORMS=cpu python -m benchmarks.checkpoint_io [--folder FOLDER] [--rounds N]

In each round a file of the same bytes is written and synced, the step is saved until it has its name, the file is read
into fresh memory, and the step is restored by a process of its own, whose peak memory is that of the system (VmHWM)
less what it was before. Files were just written, so that reads come from memory: a disk would hide what we add. Then 1
and 4 processes load policy and reward model as PPO does, and the system counts what each is given (`rchar`). Writes
benchmarks/results/checkpoint_io.json.
"""

import argparse
import datetime
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.host import processes
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.sharding import make_mesh, state_shapes
from rlhfjax.training.checkpoint import Checkpoints, load_model, meta_of

RESULT = Path(__file__).with_name("results") / "checkpoint_io.json"
SIZES: dict[str, Any] = {"vocab_size": 8192, "layers": 12, "width": 640, "heads": 10, "kv_heads": 5, "context": 64}
PIECE = 1 << 26


def model() -> LanguageModel:
    return LanguageModel(decoder_config("llama", **SIZES))


def shapes(mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Models and training state: of a policy and a reward model parameters, of the policy both moments."""
    policy = jax.eval_shape(model().init, jax.random.key(0))
    models = {"policy": policy, "reward": jax.eval_shape(model().init_scalar, jax.random.key(0))}
    training = ({"mu": policy, "nu": policy}, jax.eval_shape(lambda: jnp.int32(0)))
    return state_shapes(mesh, models), state_shapes(mesh, training)


def size_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result = measured(Path(folder), given.rounds)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    draw, mesh = np.random.default_rng(0), make_mesh(data=1)
    models, training = jax.tree.map(
        lambda leaf: jax.device_put(draw.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding), shapes(mesh)
    )
    size = size_of((models, training))
    loads = [round(os.getloadavg()[0], 1)]
    rows = [one_round(folder, models, training, size) for _ in range(rounds)]
    loads.append(round(os.getloadavg()[0], 1))
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratios = {
        "save": statistics.median(row["save_s"] / row["raw_write_s"] for row in rows),
        "restore": statistics.median(row["restore_s"] / row["raw_read_s"] for row in rows),
        "peak": medians["peak_bytes"] / size,
    }
    reads = {str(count): together(folder / "steps" / "1", count) for count in (1, 4)}
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "load_average": loads,
        "bytes": size,
        "rounds": rows,
        "median": medians,
        "ratio": ratios,
        "read": reads,
    }


def one_round(folder: Path, models: Any, training: Any, size: int) -> dict[str, float]:
    """Seconds of each, and the peak of a restore."""
    raw, steps = folder / "raw", folder / "steps"
    shutil.rmtree(steps, ignore_errors=True)
    row: dict[str, float] = {"raw_write_s": written(raw, models, training)}
    checkpoints = Checkpoints(steps, keep=1)
    began = time.perf_counter()
    checkpoints.save(1, models, training, meta_of("policy", model(), None))
    row["blocked_s"] = time.perf_counter() - began
    checkpoints.wait()
    row["save_s"] = time.perf_counter() - began
    checkpoints.close()
    for _ in range(2):  # the first time to have it in memory, as the step is
        began = time.perf_counter()
        held = np.empty(size, np.uint8)
        with raw.open("rb", 0) as file:
            for start in range(0, size, PIECE):
                file.readinto(held[start : start + PIECE].data)
        row["raw_read_s"] = time.perf_counter() - began
        del held
    raw.unlink()
    return row | child("restore", str(steps))


def written(path: Path, models: Any, training: Any) -> float:
    began = time.perf_counter()
    with path.open("wb", 0) as file:
        for leaf in jax.tree.leaves((models, training)):
            octets = np.asarray(leaf).reshape(-1).view(np.uint8).data
            while octets:
                octets = octets[file.write(octets[:PIECE]) :]
        os.fsync(file.fileno())
    return time.perf_counter() - began


def child(*words: str, index: int = 0) -> dict[str, float]:
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint_io", *words, str(index)], capture_output=True, check=True
    ).stdout
    return json.loads(told.splitlines()[-1])


def restore(folder: Path) -> dict[str, float]:
    """In a process by itself, which has read a model before: seconds and peak memory of a restore."""
    checkpoints = Checkpoints(folder, keep=1)
    models, training = shapes(make_mesh(data=1))
    load_model(folder / "1", item="reward")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began = time.perf_counter()
    held = checkpoints.restore(1, models, training)
    seconds = time.perf_counter() - began
    return {"restore_s": seconds, "peak_bytes": status("VmHWM") - before + 0 * len(held)}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def together(step_dir: Path, count: int) -> list[dict[str, float]]:
    """What each of so many processes reads and holds: policy and reward model, split over all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [sys.executable, "-m", "benchmarks.checkpoint_io", "load", str(step_dir), coordinator, str(count)]
    started = [subprocess.Popen([*words, str(index)], stdout=subprocess.PIPE) for index in range(count)]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def load(step_dir: Path, coordinator: str, count: int, index: int) -> dict[str, float]:
    place = processes.Place(coordinator, count, index, coordinator) if count > 1 else None
    with processes.started(place, heartbeat=100, timeout=300, say=print, failed=lambda error: 1):
        mesh = make_mesh(data=1, fsdp=count)
        load_model(step_dir, mesh, item="reward")  # what is imported and compiled for it
        before = counted()
        held = [load_model(step_dir, mesh, item=item)[1] for item in ("policy", "reward")]
        read = counted() - before
        shards = (shard.data.nbytes for leaf in jax.tree.leaves(held) for shard in leaf.addressable_shards)
        loaded = sum(shards)
    return {"read_bytes": read, "loaded_bytes": loaded, "ratio": read / loaded}


def counted() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["restore", folder, _]:
            print(json.dumps(restore(Path(folder))))
        case ["load", folder, coordinator, count, index]:
            os.environ["RLHFJAX_DEVICES_PER_PROCESS"] = "1"
            print(json.dumps(load(Path(folder), coordinator, int(count), int(index))))
        case _:
            main()
