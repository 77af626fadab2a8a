"""python -m benchmarks [cpu|gpu|compiled] [--peers] [--quick] [--only NAME…] [--json FILE], or export [--layers N]

Times every workload, this package and its peers in turns, prints a table, and writes a list of rows after each
workload, so that a run that is stopped keeps what it has.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import OURS, Row, row, rows_of, table, with_ratios
from benchmarks.measures import MEASURES
from benchmarks.peers import environments
from benchmarks.systems import LEFT_OUT, ROOT, ours, peers
from benchmarks.turns import interleaved
from benchmarks.workloads import Workload, cpu_workloads, quick_workloads


def environment_rows(arguments: Sequence[str], hardware: str, peaks: dict[str, float]) -> list[Row]:
    """Where and how the figures were taken."""
    from rlhfjax.host.environment import package_versions

    facts: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | package_versions(),
        "peers": {name: environments.packages(name) for name in environments.PEERS if environments.is_installed(name)},
    }
    told = [row("environment", OURS, name, value, "") for name, value in facts.items()]
    units = {"bytes_per_second": "bytes/s"}
    return told + [row("environment", OURS, f"peak_{n}", v, units.get(n, "FLOP/s"), 1.0) for n, v in peaks.items()]


def commit() -> str | None:
    """The commit of this checkout, marked where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    sha = git("rev-parse", "HEAD")[:12] if (ROOT / ".git").exists() else ""
    return sha + (" with local changes" if sha and git("status", "--porcelain") else "") or None


def measure_peaks(quick: bool) -> tuple[str, dict[str, float]]:
    """What the device is and can do, measured in a process of its own, which gives its memory back."""
    words = [sys.executable, "-m", "benchmarks.peaks", *(["--quick"] if quick else [])]
    told = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=told)
    found = json.loads(done.stdout.splitlines()[-1])
    return found.pop("hardware"), found


def run_cpu(given: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """All workloads, then what is measured in other ways; rows are written as they come."""
    hardware, peaks = measure_peaks(given.quick)
    rows = environment_rows(arguments, hardware, peaks)
    workloads = [w for w in (quick_workloads() if given.quick else cpu_workloads()) if selected(w, given.only)]
    logs = Path(tempfile.mkdtemp(prefix="benchmarks_"))
    for workload in workloads:
        began = time.monotonic()
        against = peers(workload) if given.peers else []
        for timed in interleaved(workload, [ours(), *against], logs):
            rows += rows_of(timed, peaks)
        if given.peers:
            rows += [
                row(workload.name, s, "failed", why, "") for (s, name), why in LEFT_OUT.items() if name == workload.name
            ]
        keep(rows, given.json)
        print(f"{workload.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for name, measure in MEASURES.items():
        if not given.only or name in given.only:
            rows += measure(given.quick, given.peers)
            keep(rows, given.json)
    rows.append(row("environment", OURS, "load_average_at_end", round(os.getloadavg()[0], 2), ""))
    after = measure_peaks(given.quick)[1]
    rows += [
        row("environment", OURS, f"peak_{name}_at_end", value, "", value / peaks[name]) for name, value in after.items()
    ]
    return rows


def selected(workload: Workload, only: Sequence[str]) -> bool:
    """`--only` names workloads (ppo/A), tasks (ppo, with all its variants of minibatches) or sizes (A)."""
    return not only or bool({workload.name, workload.task, workload.size} & set(only))


def keep(rows: Sequence[Row], path: Path | None) -> None:
    """Write what there is so far."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(f" {json.dumps(item, ensure_ascii=False)}" for item in with_ratios(rows))
        path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["export"]:
        from benchmarks import export

        return export.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed, beside other systems.")
    parser.add_argument("device", nargs="?", choices=["cpu", "gpu", "compiled"], default="cpu")
    parser.add_argument("--peers", action="store_true", help="also time the peers (their environments are made once)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? its figures mean nothing")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="workloads, tasks or sizes: ppo/A, sft, B"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE, after every workload")
    given = parser.parse_args(arguments)
    if given.device == "gpu":
        from benchmarks.gpu import run_gpu

        rows = run_gpu(given, arguments)
    elif given.device == "compiled":
        from benchmarks import compiled

        if given.peers and (failed := environments.main([compiled.MAXTEXT])):
            return failed
        print(compiled.table(compiled.run_compiled(given, arguments)))
        return 0
    else:
        if given.peers and (failed := environments.main([])):
            return failed
        rows = run_cpu(given, arguments)
    keep(rows, given.json)
    print(table(with_ratios(rows)))
    return 0
