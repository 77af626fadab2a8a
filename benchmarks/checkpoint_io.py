"""What a step of 1 GB takes: saved and restored against raw files, and what processes read of it at the start of PPO.

    JAX_PLATFORMS=cpu python -m benchmarks.checkpoint_io [--folder FOLDER] [--rounds N]

In each round a file of the same bytes is written and synced, and the step is saved until it has its name. Then both are
read into fresh memory, the step by a process of its own: once from the disk, as after a restart (the system forgets the
pages of all files first), and once from the system's memory, where what was just written lies. The peak memory of a
restore is that of the system (VmHWM) less what it was before. CPU seconds are those of all threads of the process. Then
1 and 4 processes load policy and reward model as PPO does, and the system counts what each is given (`rchar`). Writes
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
from collections.abc import Callable
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
PLACES = ("disk", "memory")


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
    ratios = {"save": _ratio(rows, "save_s", "raw_write_s"), "peak": medians["peak_bytes"] / size}
    ratios |= {f"restore_{where}": _ratio(rows, f"restore_{where}_s", f"raw_read_{where}_s") for where in PLACES}
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


def _ratio(rows: list[dict[str, float]], ours: str, raw: str) -> float:
    return statistics.median(row[ours] / row[raw] for row in rows)


def one_round(folder: Path, models: Any, training: Any, size: int) -> dict[str, float]:
    """Seconds of each, of the clock and of CPUs, and the peak of a restore."""
    raw, steps = folder / "raw", folder / "steps"
    shutil.rmtree(steps, ignore_errors=True)
    row = measure("raw_write", lambda: written(raw, models, training))
    checkpoints = Checkpoints(steps, keep=1)
    meta = meta_of("policy", model(), None)

    def save() -> None:
        began = time.perf_counter()
        checkpoints.save(1, models, training, meta)
        row["blocked_s"] = time.perf_counter() - began
        checkpoints.wait()

    row |= measure("save", save)
    checkpoints.close()
    for where in PLACES:
        for name, do in (("raw_read", lambda: read_whole(raw, size)), ("restore", None)):
            for path in (raw, *steps.rglob("*")):
                prepare(path, where)
            row |= measure(f"{name}_{where}", do) if do else child("restore", str(steps), where)
    raw.unlink()
    return row


def measure(name: str, do: Callable[[], object]) -> dict[str, float]:
    began, busy = time.perf_counter(), time.process_time()
    do()
    return {f"{name}_s": time.perf_counter() - began, f"{name}_cpu_s": time.process_time() - busy}


def prepare(path: Path, where: str) -> None:
    """The system forgets the pages of a file, or has all of them."""
    if not path.is_file():
        return
    with path.open("rb", 0) as file:
        if where == "disk":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(PIECE):
                pass


def read_whole(path: Path, size: int) -> None:
    held = np.empty(size, np.uint8)
    with path.open("rb", 0) as file:
        for start in range(0, size, PIECE):
            rest = held[start : start + PIECE].data
            while rest:
                rest = rest[file.readinto(rest) :]


def written(path: Path, models: Any, training: Any) -> None:
    with path.open("wb", 0) as file:
        for leaf in jax.tree.leaves((models, training)):
            octets = np.asarray(leaf).reshape(-1).view(np.uint8).data
            while octets:
                octets = octets[file.write(octets[:PIECE]) :]
        os.fsync(file.fileno())


def child(*words: str, index: int = 0) -> dict[str, float]:
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint_io", *words, str(index)], capture_output=True, check=True
    ).stdout
    return json.loads(told.splitlines()[-1])


def restore(folder: Path, where: str) -> dict[str, float]:
    """In a process by itself, which has read a model before: seconds and peak memory of a restore."""
    checkpoints = Checkpoints(folder, keep=1)
    models, training = shapes(make_mesh(data=1))
    load_model(folder / "1", item="reward")
    for path in folder.rglob("*"):
        prepare(path, where)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    held: list[Any] = []
    row = measure(f"restore_{where}", lambda: held.append(checkpoints.restore(1, models, training)))
    return row | {"peak_bytes": status("VmHWM") - before}


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
        case ["restore", folder, where, _]:
            print(json.dumps(restore(Path(folder), where)))
        case ["load", folder, coordinator, count, index]:
            os.environ["RLHFJAX_DEVICES_PER_PROCESS"] = "1"
            print(json.dumps(load(Path(folder), coordinator, int(count), int(index))))
        case _:
            main()
