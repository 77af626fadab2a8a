"""What programs are for chips that are not here: compiled by libtpu, each in a process of its own, beside MaxText's.

    python -m benchmarks compiled [--peers] [--only NAME…] [--json FILE]

Nothing runs, so nothing here is a time on a TPU: only bytes, products and what compiling takes. The compiler is the
installed libtpu; a peer is compiled by its own, so compare with the same (`versions` among the rows).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.command import ROOT, environment_rows, keep
from benchmarks.figures import OURS, Row, row
from benchmarks.peers import environments
from benchmarks.shapes import CASES, PEER, Case

MAXTEXT = "maxtext"
UNITS = {
    "arguments_gib": "GiB",
    "temporaries_gib": "GiB",
    "host_arguments_gib": "GiB",
    "peak_gib": "GiB",
    "product_flops": "FLOPs",
    "cached_flops": "FLOPs",
    "inside_ring_gib": "GiB",
    "inside_result_gib": "GiB",
    "outside_ring_gib": "GiB",
    "outside_result_gib": "GiB",
    "lower_s": "s",
    "compile_s": "s",
    "compile_cpu_s": "s",
}
# What a program has to send and to compute by shapes alone, where `benchmarks.bounds` says it.
MUSTS = {"must_inside_gib": "GiB", "must_outside_gib": "GiB", "must_product_flops": "FLOPs"}
SHOWN = (
    "temporaries_gib",
    "product_flops",
    "inside_ring_gib",
    "outside_ring_gib",
    "outside_result_gib",
    "compile_cpu_s",
)


class CompilerDied(Exception):
    """The process of a compiler ended without an answer."""


def compiled(case: Case, python: str = sys.executable, module: str = "benchmarks.compile_one") -> dict[str, Any]:
    """What `compile_one` says of a case. Raises CompilerDied with the signal, or with the last lines that it wrote."""
    words = [python, "-m", module, json.dumps(case.described())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode < 0:
        raise CompilerDied(f"the compiler died: {signal.Signals(-done.returncode).name}")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise CompilerDied(f"exit {done.returncode}: {said[-1][:300] if said else 'nothing said'}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(case: Case, system: str, found: dict[str, Any]) -> list[Row]:
    """The figures of a program as rows of a result file."""
    rows = [row(case.name, system, name, round(found[name], 4), unit) for name, unit in UNITS.items()]
    rows += [row(case.name, system, name, found[name], "GiB") for name in ("between_gib", "by_kind_gib", "most_gib")]
    return rows + [row(case.name, system, name, round(found[name], 4), MUSTS[name]) for name in MUSTS if name in found]


def measured(case: Case, system: str, **how: str) -> list[Row]:
    """Rows of a case, or the one that says why there are none."""
    try:
        found = compiled(case, **how)
    except CompilerDied as error:
        return [row(case.name, system, "failed", str(error), "")]
    return rows_of(case, system, found)


def table(rows: Sequence[Row]) -> str:
    """One line a program and system."""
    lines = [f"{'program':24} {'system':10}" + "".join(f"{name:>20}" for name in SHOWN)]
    for name, system in dict.fromkeys((r["workload"], r["system"]) for r in rows if r["workload"] != "environment"):
        said = {r["metric"]: r["value"] for r in rows if (r["workload"], r["system"]) == (name, system)}
        cells = [f"{said[key]:>20.4g}" for key in SHOWN] if "failed" not in said else ["  " + said["failed"]]
        lines.append(f"{name:24} {system:10}" + "".join(cells))
    return "\n".join(lines)


def run_compiled(given: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """All cases, or those that `--only` names; rows are written as they come."""
    rows = environment_rows(arguments, "compiled by libtpu for chips that are not here", {})
    for case in CASES:
        if given.only and not any(case.name == name or case.name.startswith(f"{name}/") for name in given.only):
            continue
        rows += measured(case, OURS)
        if given.peers and case.name in PEER:
            peer = {"python": str(environments.python_of(MAXTEXT)), "module": "benchmarks.peers.maxtext_step"}
            rows += measured(case, MAXTEXT, **peer)
        keep(rows, given.json)
        print(table([r for r in rows if r["workload"] == case.name]), file=sys.stderr, flush=True)
    return rows
