"""Results of whole runs as Markdown: one table per configuration, one column per seed."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhfjax.evaluation.report.display import change, duration, number, number_interval, percent, percent_interval
from rlhfjax.evaluation.rows import MEASURES, REWARD_MODEL
from rlhfjax.evaluation.statistics import Interval

Result = dict[str, Any]
Row = tuple[str, Callable[[Result], str]]  # a name, and how one run shows it
MANY = 5  # so many runs are shown as the first of them and what all of them span
SHOWN_MEASURES = ("within_heldout", "across_clear", "comparisons")  # the result files hold the others too


def tables(results: Sequence[Result]) -> str:
    """All results as Markdown: for each configuration its commands, hardware and date, then one table."""
    parts = []
    for result in results:
        runs = result["runs"]
        shown = runs if len(runs) < MANY else runs[:1]
        parts.append(f"### {result['config']}\n\n{_caption(shown)}\n\n{_table(shown)}")
        if shown is not runs:
            parts.append(_spread(runs))
    return "\n\n".join(parts).replace("\u00a0", " ") or "No results are committed yet."


def summary(results: Sequence[Result]) -> str:
    """Six figures of each configuration side by side; of several runs their mean, the lowest and the highest."""
    shown = [result["runs"] for result in results if all(_summed_up(run) for run in result["runs"])]
    if not shown:
        return "No results are committed yet."
    names = [result["config"] for result in results if result["runs"] in shown]
    hardware = [runs[0]["hardware"] + (f", {len(runs)} runs" if len(runs) > 1 else "") for runs in shown]
    head = ["", *(f"`{name}`, {where}" for name, where in zip(names, hardware, strict=True))]
    body = [
        [name, *(_range(get, show, runs) if len(runs) > 1 else show(get(runs[0])) for runs in shown)]
        for name, get, show in (row for row in _FIGURES if row[0] in _SUMMARY)
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
    return table.replace("\u00a0", " ")


def _summed_up(run: Result) -> bool:
    judges = {row["judge"] for row in run["win_rates"]}
    return {"ridge judge", "VADER"} <= judges and "ppo" in run["policies"] and REWARD_MODEL in run["reward_accuracy"]


def _caption(runs: list[Result]) -> str:
    def each(show: Callable[[Result], str]) -> str:
        return ", ".join(dict.fromkeys(show(run) for run in runs))

    versions = each(lambda run: f"rlhfjax {run['versions']['rlhfjax']}, jax {run['versions']['jax']}")
    again = sum(run["attempts"] > 1 for run in runs)
    resumed = f" {again} of {len(runs)} took several attempts; times are of each stage's last." if again else ""
    return (
        f"{each(lambda run: '`' + run['command'] + '`')} on {each(lambda run: run['hardware'])}, "
        f"{each(lambda run: run['date'][:10])}, {versions}. Brackets are 95 % intervals within one run.{resumed}"
    )


def _table(runs: list[Result]) -> str:
    several = len({run["versions"]["jax"] for run in runs}) > 1
    head = ["", *(f"seed {run['seed']}" + (f", jax {run['versions']['jax']}" if several else "") for run in runs)]
    body = [[name, *(show(run) for run in runs)] for name, show in _rows(runs[0])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _signed(share: float) -> str:
    return change(1 + share, 1)


def _spread(runs: list[Result]) -> str:
    """What moves from run to run: by version of jax the mean of each figure, with the lowest and the highest."""
    by_jax: dict[str, list[Result]] = {}
    for run in runs:
        by_jax.setdefault(run["versions"]["jax"], []).append(run)
    said = [f"jax {version}, {len(found)} seeds" for version, found in by_jax.items()]
    head = ["Mean (lowest to highest)", *said]
    body = [[name, *(_range(get, show, found) for found in by_jax.values())] for name, get, show in _FIGURES]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _range(get: Callable[[Result], float], show: Callable[[float], str], runs: list[Result]) -> str:
    values = [get(run) for run in runs]
    return f"{show(sum(values) / len(values))} ({show(min(values))} to {show(max(values))})"


def _won(judge: str) -> Callable[[Result], float]:
    return lambda run: next(row["win"][0] for row in run["win_rates"] if row["judge"] == judge)


def _accurate(measure: str) -> Callable[[Result], float]:
    return lambda run: run["reward_accuracy"][REWARD_MODEL][measure][0]


_FIGURES: tuple[tuple[str, Callable[[Result], float], Callable[[float], str]], ...] = (
    ("Accuracy of reward model, one batch, held-out labelers", _accurate("within_heldout"), percent),
    ("Accuracy of reward model, two batches, over 0.5 apart", _accurate("across_clear"), percent),
    ("ppo preferred to sft by ridge judge", _won("ridge judge"), percent),
    ("ppo preferred to sft by VADER", _won("VADER"), percent),
    ("KL(ppo ‖ sft), nats per response", lambda run: run["policies"]["ppo"]["kl"], number),
    ("Length, sft → ppo", lambda run: run["policies"]["ppo"]["length_change_from_sft"], _signed),
    ("Distinct 2-grams, sft → ppo", lambda run: run["policies"]["ppo"]["distinct_2_change_from_sft"], _signed),
    ("Wall time, all stages", lambda run: sum(run["stage_seconds"].values()), duration),
)
_SUMMARY = [name for name, _, _ in _FIGURES if "over 0.5" not in name and "Distinct" not in name]


def _rows(run: Result) -> Iterator[Row]:
    """The rows of a table: whatever its first run has measured."""
    yield "Wall time, all stages", lambda run: duration(sum(run["stage_seconds"].values()))
    stages = " → ".join(run["heldout_losses"])
    for name in next(iter(run["heldout_losses"].values()), {}):
        yield f"Loss on held-out {name}, nats per token, {stages}", lambda run, name=name: _losses(run, name)
    for measure in SHOWN_MEASURES:
        for scorer, values in run["reward_accuracy"].items():
            if values.get(measure):
                yield f"Accuracy of {scorer} ({_asked(measure)})", _share("reward_accuracy", scorer, measure)
    for judge, values in run["judge_accuracy"].items():
        if values.get("across_clear") and judge not in run["reward_accuracy"]:
            yield f"Accuracy of {judge} ({_asked('across_clear')})", _share("judge_accuracy", judge, "across_clear")
    for row in run["win_rates"]:
        yield f"{row['policy']} preferred to {row['baseline']} by {row['judge']}", _wins(row["judge"])
    if names := _compared(run):
        yield from _policy_rows(*names)


def _compared(run: Result) -> tuple[str, str] | None:
    """The policy that the last one started from, and the last one; None where only one was sampled."""
    names = tuple(run["policies"])
    return names if len(names) == 2 else None


def _policy_rows(before: str, last: str) -> Iterator[Row]:
    pair = f"{before} → {last}"
    yield f"KL({last} ‖ {before}), nats per response", lambda run: _bounded(run["policies"][last], "kl", 2)
    yield f"Entropy, nats per token, {pair}", lambda run: _both(run, "entropy", 2)
    yield f"Length, tokens, {pair}", lambda run: _both(run, "length", 1)
    yield f"Distinct 2-grams, {pair}", lambda run: _both(run, "distinct_2", 3)
    yield f"Responses that end by themselves, {pair}", lambda run: _both(run, "eos_rate", None)


def _asked(measure: str) -> str:
    text = MEASURES[measure]
    return text[0].lower() + text[1:]


def _share(table: str, scorer: str, measure: str) -> Callable[[Result], str]:
    return lambda run: _interval(run[table].get(scorer, {}).get(measure))


def _wins(judge: str) -> Callable[[Result], str]:
    return lambda run: _interval(next((row["win"] for row in run["win_rates"] if row["judge"] == judge), None))


def _interval(value: list[float | None] | None) -> str:
    return percent_interval(Interval(*map(_number, value)) if value else None)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _losses(run: Result, name: str) -> str:
    losses = {stage: _number(sets[name]["nats_per_token"]) for stage, sets in run["heldout_losses"].items()}
    shown = " → ".join(number(loss) for loss in losses.values())
    names = _compared(run)
    return f"{shown} ({change(losses[names[1]], losses[names[0]])})" if names and losses.keys() >= set(names) else shown


def _both(run: Result, key: str, digits: int | None) -> str:
    before, last = run["policies"].values()
    changed = f" ({change(_number(last[key]), _number(before[key]))})" if key in ("length", "distinct_2") else ""
    return f"{_bounded(before, key, digits)} → {_bounded(last, key, digits)}{changed}"


def _bounded(policy: Result, key: str, digits: int | None) -> str:
    """A figure with its interval, where the run has one; decimals, or None for a share."""
    ends = policy.get("intervals", {}).get(key)
    if ends is None:
        return percent(_number(policy[key])) if digits is None else number(_number(policy[key]), digits)
    interval = Interval(*map(_number, ends))
    return percent_interval(interval) if digits is None else number_interval(interval, digits)
