"""A 1B-class Llama on an accelerator, in bfloat16: training, decoding, generation beside transformers, PPO, a profile.

Every measurement is a process of its own with a limit, and rows are written as they come. Neither data nor settings
are read, so a bare checkout with jax, flax, optax and orbax is enough (see benchmarks.standins).
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import standins, traces
from benchmarks.figures import OURS, Row, row, rows_of
from benchmarks.systems import ROOT, ours
from benchmarks.turns import System, interleaved
from benchmarks.workloads import Workload

LIMIT = 150.0  # seconds until a process has to answer: imports, weights, compiling
BUDGET = 460.0  # seconds after which nothing new is started


def gpu_workloads(quick: bool) -> list[Workload]:
    """In the order of what matters most, since a run may be stopped."""
    g = Workload("sft", "G", rows=8, length=2048, repeats=8, dtype="bfloat16")
    text = Workload("decode", "G", rows=1, prompt=64, response=128, slots=1, dtype="bfloat16")
    found = [
        g,
        *(replace(text, task=f"decode_batch{n}", rows=n, slots=n, repeats=3) for n in (8, 1, 64)),
        replace(text, task="generation", rows=64, slots=64, prompt=128, repeats=3),
        Workload("ppo", "G", rows=16, prompt=128, response=128, epochs=4, repeats=2, dtype="bfloat16"),
    ]
    if not quick:
        return found
    dtype = "float32"
    small = {"size": "tiny", "dtype": dtype, "repeats": 2}
    return [
        replace(
            w,
            **small,
            rows=min(w.rows, 4),
            slots=min(w.slots, 4),
            length=w.length and 32,
            prompt=w.prompt and 8,
            response=w.response and 8,
        )
        for w in found
    ]


def systems_for(workload: Workload) -> list[System]:
    """This package; transformers and TRL 1.12 where this interpreter has them."""
    beside_torch = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    own = beside_torch if workload.task == "generation" else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    first = ours()
    found = [replace(first, environment=first.environment | own, limit=LIMIT)]
    scripts = ROOT / "benchmarks" / "peers"
    if workload.task == "generation" and _has("torch", "transformers"):
        command = (sys.executable, str(scripts / "transformers_generation.py"))
        found.append(System("transformers", command, limit=LIMIT))
    if workload.task == "ppo" and _has("torch", "trl.experimental.ppo"):
        found.append(System("trl 1.12", (sys.executable, str(scripts / "trl_ppo.py")), limit=LIMIT))
    return found


def _has(*modules: str) -> bool:
    try:
        return all(importlib.util.find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:
        return False


def run_gpu(given: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """All measurements that fit into the budget."""
    from benchmarks.command import environment_rows, keep, measure_peaks, selected

    began, logs = time.monotonic(), Path(tempfile.mkdtemp(prefix="benchmarks_"))
    absent = standins.install()
    hardware, peaks = measure_peaks(given.quick)
    rows = [
        *environment_rows(arguments, hardware, peaks),
        row("environment", OURS, "stand_ins", absent, ""),
    ]
    keep(rows, given.json)
    for workload in gpu_workloads(given.quick):
        if not selected(workload, given.only):
            continue
        if time.monotonic() - began > BUDGET:
            rows.append(row(workload.name, OURS, "failed", "no time was left", ""))
            continue
        profiled = workload.task in ("sft", "ppo") or workload.task == "decode_batch8"
        folder = Path(tempfile.mkdtemp(prefix="trace_")) if profiled else None
        chosen = systems_for(workload)
        if folder:
            told = chosen[0].environment | {"BENCHMARK_TRACE": str(folder)}
            chosen[0] = replace(chosen[0], environment=told, warmup=2)  # the second is traced, and does not count
        for timed in interleaved(workload, chosen, logs):
            rows += rows_of(timed, peaks)
        if folder:
            rows += profile_rows(workload.name, folder)
        if given.peers and workload.task == "ppo" and len(chosen) == 1:
            rows.append(row(workload.name, "trl 1.12", "failed", "TRL 1.12 is not installed here", ""))
        keep(rows, given.json)
        print(f"{workload.name}: {time.monotonic() - began:.0f} s since the start", file=sys.stderr, flush=True)
    _show_logs(logs)
    return rows


def profile_rows(name: str, folder: Path, count: int = 12) -> list[Row]:
    """The kinds of operations of the traced step, and its longest operations, as shares of all operations' time."""
    seconds = traces.seconds_by_operation(folder)
    total = sum(seconds.values())
    if not total:
        return [row(f"profile/{name}", OURS, "failed", "the trace holds no operation of the device", "")]
    kinds = [row(f"profile/{name}", OURS, kind, s, "s", s / total) for kind, s in traces.split(seconds).items()]
    longest = list(seconds.items())[:count]
    return kinds + [row(f"profile/{name}", OURS, f"op {operation[:80]}", s, "s", s / total) for operation, s in longest]


def _show_logs(logs: Path) -> None:
    if os.environ.get("BENCHMARK_LOGS"):
        for path in sorted(logs.iterdir()):
            print(f"--- {path.name}\n{path.read_text('utf-8', 'replace')[-2000:]}", file=sys.stderr)
