"""python -m benchmarks.pods_table: the table of docs/pods.md, of what is in results/compiled.json."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import OURS, Row
from benchmarks.shapes import CASES

FILE = Path(__file__).parent / "results" / "compiled.json"
HEADS = (
    "program",
    "arguments",
    "temporaries",
    "products, FLOPs",
    "must be",
    "sent in layers",
    "must be",
    "outside",
    "must be",
    "CPU s",
)
TOPOLOGIES = {"v5p:4x4x4", "v5p:8x8x8", "v5p:4x4x8"}  # which the text before the table names


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown, a line a program: ours, and below it a peer's."""
    yield f"| {' | '.join(HEADS)} |"
    yield "|---" * len(HEADS) + "|"
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        known.setdefault((row["workload"], row["system"]), {})[row["metric"]] = row["value"]
    for case in CASES:
        for (name, system), said in known.items():
            if name == case.name and "product_flops" in said:
                where = "" if case.topology in TOPOLOGIES or system != OURS else f", {case.topology}"
                title = f"`{name}`{where}" if system == OURS else "the same, MaxText 0.2.5"
                yield f"| {title} | {' | '.join(_cells(said))} |"
            elif name == case.name and "failed" in said:
                yield f"| `{name}` | {said['failed']} |" + " |" * (len(HEADS) - 2)


def _cells(said: dict[str, Any]) -> Iterator[str]:
    yield f"{said['arguments_gib']:.1f}"
    yield f"{said['temporaries_gib']:.2f}"
    yield _flops(said["product_flops"])
    yield _flops(said.get("must_product_flops"))
    for place in ("inside", "outside"):
        yield _gib(said[f"{place}_ring_gib"])
        yield _gib(said.get(f"must_{place}_gib"))
    yield f"{said['compile_cpu_s']:.0f}"


def _flops(count: float | None) -> str:
    return "" if count is None else f"{count:.3e}".replace("e+", "e") if count else "0"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:,.0f}" if size >= 1000 else f"{size:.1f}" if size >= 0.05 else "0"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(FILE.read_text(encoding="utf-8")))))
