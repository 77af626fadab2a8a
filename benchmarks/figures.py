"""From what processes said to rows of a result file: medians, ratios to the best peer, shares of a peak.

A row is {workload, system, metric, value, unit, ratio_to_best_peer, share_of_peak}. The ratio is value / the best value
of a peer, so above 1 is better for a rate and below 1 for seconds and bytes; it is null without a peer that measured
the same. The share is the time that the work must take at the measured peaks (matrix products, or reading memory where
that takes longer; see benchmarks.flops) over the time that it took.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.flops import decode_bytes, step_flops
from benchmarks.turns import Timed

Row = dict[str, Any]
OURS = "rlhfjax"
HIGHER_IS_BETTER = ("tokens/s",)
GENERATES = ("generation", "decode")


def row(workload: str, system: str, metric: str, value: Any, unit: str, share: float | None = None) -> Row:
    return {
        "workload": workload,
        "system": system,
        "metric": metric,
        "value": value,
        "unit": unit,
        "ratio_to_best_peer": None,
        "share_of_peak": share,
    }


def bound_seconds(work: dict[str, Any], peaks: dict[str, float], lengths: list[int] | None = None) -> float:
    """The least time that a step can take on this machine; text is also bound by reading the weights for each token."""
    arithmetic = step_flops(work, lengths) / peaks[f"flops_{work['dtype']}"]
    if not work["task"].startswith(GENERATES):
        return arithmetic
    return max(arithmetic, decode_bytes(work | {"lengths": lengths or []}) / peaks["bytes_per_second"])


def rows_of(timed: Timed, peaks: dict[str, float]) -> list[Row]:
    """Everything that is known of one system at one workload; a failure is a row of its own."""
    name, system = timed.workload.name, timed.system
    if not timed.steps:
        return [row(name, system, "failed", timed.error or "no step", "")]
    seconds = [step["seconds"] for step in timed.steps]
    rates = [step["tokens"] / step["seconds"] for step in timed.steps]
    # TRL's PPO takes the old log-probabilities from the sampler; the others compute them again.
    work = timed.workload.described() | {"recomputes": system != "trl 1.12"}
    shares = [bound_seconds(work, peaks, step.get("lengths")) / step["seconds"] for step in timed.steps]
    found = [
        row(name, system, "tokens_per_second", statistics.median(rates), "tokens/s", statistics.median(shares)),
        row(name, system, "step_seconds", statistics.median(seconds), "s"),
        row(name, system, "step_seconds_min", min(seconds), "s"),
        row(name, system, "step_seconds_max", max(seconds), "s"),
        row(name, system, "steps", len(seconds), "1"),
    ]
    if "since_launch_seconds" in timed.ready:
        found.append(row(name, system, "command_to_first_step_seconds", timed.ready["since_launch_seconds"], "s"))
    if "compile_seconds" in timed.ready:
        found.append(row(name, system, "compile_seconds", timed.ready["compile_seconds"], "s"))
        later = sum(step.get("compilations", 0) for step in timed.steps)
        found.append(row(name, system, "compilations_after_first_step", later, "1"))
    for phase in timed.steps[0].get("phases") or {}:
        spent = statistics.median(step["phases"][phase] for step in timed.steps)
        found.append(row(name, system, f"{phase}_seconds", spent, "s"))
    memory = timed.steps[-1].get("device_bytes") or timed.end.get("peak_memory_bytes")
    if memory:
        found.append(row(name, system, "peak_memory", memory, "bytes"))
    if timed.error:
        found.append(row(name, system, "failed", timed.error, ""))
    return found


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with `ratio_to_best_peer` filled in; the best peer is the best system other than this package."""
    best: dict[tuple[str, str], float] = {}
    for item in rows:
        if item["system"] == OURS or not isinstance(item["value"], int | float) or not item["unit"]:
            continue
        key = (item["workload"], item["metric"])
        better = max if item["unit"] in HIGHER_IS_BETTER else min
        best[key] = better(best.get(key, item["value"]), item["value"])
    return [item | {"ratio_to_best_peer": _ratio(item, best)} for item in rows]


def _ratio(item: Row, best: dict[tuple[str, str], float]) -> float | None:
    of = best.get((item["workload"], item["metric"]))
    comparable = item["unit"] not in ("", "1") and isinstance(item["value"], int | float)
    return item["value"] / of if of and comparable else None


def table(rows: Iterable[Row]) -> str:
    """One line a system and workload, as Markdown."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for item in rows:
        if item["workload"] != "environment":
            found.setdefault((item["workload"], item["system"]), {})[item["metric"]] = item
    lines = [
        "| workload | system | tokens/s | × best peer | of peak | step, s | memory | compile | to first step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {workload} | {system} | {' | '.join(_cells(metrics))} |" for (workload, system), metrics in found.items()
    ]
    return "\n".join(lines)


def _cells(metrics: dict[str, Row]) -> list[str]:
    def value(metric: str, show: str = "{:.3g}", scale: float = 1.0) -> str:
        return show.format(metrics[metric]["value"] * scale) if metric in metrics else ""

    if "tokens_per_second" not in metrics:
        if "failed" in metrics:
            return [str(metrics["failed"]["value"]).replace("|", "/"), *[""] * 6]
        said = "; ".join(f"{name} {item['value']:.4g} {item['unit']}" for name, item in metrics.items())
        return [said, *[""] * 6]
    speed = metrics["tokens_per_second"]
    ratio, share = speed["ratio_to_best_peer"], speed["share_of_peak"]
    return [
        f"{speed['value']:,.0f}" if speed["value"] >= 100 else f"{speed['value']:.1f}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if share is None else f"{100 * share:.0f} %",
        f"{value('step_seconds')} ({value('step_seconds_min')}–{value('step_seconds_max')}; {value('steps')})",
        value("peak_memory", "{:.2f} GB", 1e-9),
        value("compile_seconds", "{:.1f} s"),
        value("command_to_first_step_seconds", "{:.1f} s"),
    ]
