"""The speed tables of docs/performance.md and the line in README.md, of the committed files; nothing is measured here.

    python -m benchmarks.speed_table

writes them between their markers.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.blocks import write_block

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "performance.md"
OURS = "rlhfjax"
MAIN = {"sft/A", "reward/A", "generation/A", "ppo/A", "dpo/A", "grpo/A", "sft/B", "generation/B", "ppo/B"}
Row = dict[str, Any]


def speed_tables(folder: Path) -> str:
    """All committed speed results as Markdown, CPU first."""
    parts = []
    for path in sorted(folder.glob("speed_*.json")):
        rows = json.loads(path.read_text("utf-8"))
        parts.append(f"{caption(rows, path.name)}\n\n{speeds(rows)}\n\n{others(rows)}".rstrip())
    return "\n\n".join(parts) or "No results are committed yet."


def caption(rows: Sequence[Row], name: str) -> str:
    """Command, hardware, date, versions, load and peaks, as the file has them."""
    found = {item["metric"]: item["value"] for item in rows if item["workload"] == "environment"}
    versions = ", ".join(
        f"{package} {found['versions'][package]}"
        for package in ("rlhfjax", "jax", "python")
        if package in found["versions"]
    )
    peers = sorted({package for packages in found["peers"].values() for package in packages})
    against = f"; peers: {', '.join(peers)}" if peers else ""
    peaks = [
        _peak(metric, found[metric]) for metric in found if metric.startswith("peak_") and not metric.endswith("_end")
    ]
    return (
        f"`{found['command']}` on {found['hardware']}, {found['date'][:10]}, {versions}{against}. Load average "
        f"{found['load_average']} at the start. Measured peaks: {', '.join(peaks)}. "
        f"[All figures](../benchmarks/results/{name}); medians, in brackets × as fast as that system."
    )


def _peak(metric: str, value: float) -> str:
    if metric == "peak_bytes_per_second":
        return f"{value / 1e9:,.0f} GB/s read"
    return f"{value / 1e9:,.0f} GFLOP/s {metric.removeprefix('peak_flops_')}"


def speeds(rows: Sequence[Row]) -> str:
    """One line per workload: tokens per second of every system, and how often ours is as fast."""
    table = _by_workload(rows)
    peers = list(dict.fromkeys(system for found in table.values() for system in found if system != OURS))
    lines = [["tokens/s", OURS, "of peak", "memory", "steps", *peers], ["---"] * (5 + len(peers))]
    for name, found in table.items():
        own = found[OURS]
        speed = own["tokens_per_second"]
        cells = [
            name,
            _number(speed["value"]),
            f"{100 * speed['share_of_peak']:.0f} %",
            f"{own['peak_memory']['value'] / 1e9:.2f} GB" if "peak_memory" in own else "",
            str(own["steps"]["value"]),
        ]
        lines.append(cells + [_against(speed["value"], found.get(peer, {})) for peer in peers])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _by_workload(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows by workload, system and metric, of the workloads whose speed was measured here."""
    table: dict[str, dict[str, dict[str, Row]]] = {}
    for item in rows:
        if item["workload"] != "environment":
            table.setdefault(item["workload"], {}).setdefault(item["system"], {})[item["metric"]] = item
    return {name: found for name, found in table.items() if "tokens_per_second" in found.get(OURS, {})}


def _against(own: float, peer: dict[str, Row]) -> str:
    if "tokens_per_second" not in peer:
        return "–"
    value = peer["tokens_per_second"]["value"]
    return f"{_number(value)} ({own / value:.2f} ×)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def others(rows: Sequence[Row]) -> str:
    """What is no rate: seconds to a first step, memory of the loss."""
    lines = []
    for item in rows:
        if item["workload"].startswith("first_step") and item["metric"] == "command_to_first_step_seconds":
            cache, size = item["workload"].removeprefix("first_step_").split("/")
            lines.append(
                f"- From the command to the end of the first PPO iteration, {size}, compile cache {cache}, "
                f"{item['system']}: {item['value']:.1f} s"
            )
        if item["metric"] == "temporary_of_logits":
            vocabulary = item["workload"].split("/")[1]
            lines.append(
                f"- Temporary memory of loss and gradient at a vocabulary of {int(vocabulary):,}: "
                f"{100 * item['value']:.1f} % of the logits' size"
            )
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """One line: how often as fast as the fastest peer the main workloads are on a CPU, with that peer's name."""
    said = {}
    for path in sorted(folder.glob("speed_cpu*.json")):
        table = _by_workload(json.loads(path.read_text("utf-8")))
        for name in MAIN & table.keys():
            value = table[name][OURS]["tokens_per_second"]["value"]
            rates = {
                system: found["tokens_per_second"]["value"]
                for system, found in table[name].items()
                if system != OURS and "tokens_per_second" in found
            }
            if rates:
                fastest = max(rates, key=rates.__getitem__)
                said[name] = f"`{name}` {value / rates[fastest]:.2f} × ({fastest})"
    return ", ".join(said[name] for name in sorted(said))


def main() -> int:
    write_block(DOCUMENT, "speed", speed_tables(RESULTS))
    write_block(README, "speed", summary(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
