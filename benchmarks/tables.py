"""Results of whole runs as Markdown: one table a configuration, one column a seed."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhfjax.evaluation.display import change, duration, number, percent, percent_interval
from rlhfjax.evaluation.rows import MEASURES
from rlhfjax.evaluation.statistics import Interval

Result = dict[str, Any]
Row = tuple[str, Callable[[Result], str]]  # a name, and how one run shows it
SHOWN_MEASURES = ("within_heldout", "across_clear", "comparisons")  # the result files hold the others too


def tables(results: Sequence[Result]) -> str:
    """All results as Markdown: for each configuration its commands, hardware and date, then one table."""
    parts = [f"### {result['config']}\n\n{_caption(result['runs'])}\n\n{_table(result['runs'])}" for result in results]
    return "\n\n".join(parts).replace("\u00a0", " ") or "No results are committed yet."


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
    head = ["", *(f"seed {run['seed']}" for run in runs)]
    body = [[name, *(show(run) for run in runs)] for name, show in _rows(runs[0])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _rows(run: Result) -> Iterator[Row]:
    """The rows of a table: whatever its first run has measured."""
    yield "Wall time, all stages", lambda run: duration(sum(run["stage_seconds"].values()))
    stages = " → ".join(run["heldout_losses"])
    for name in next(iter(run["heldout_losses"].values()), {}):
        yield f"Loss on held-out {name}, nats a token, {stages}", lambda run, name=name: _losses(run, name)
    for measure in SHOWN_MEASURES:
        for scorer, values in run["reward_accuracy"].items():
            if values.get(measure):
                yield f"Accuracy of {scorer} ({_asked(measure)})", _share("reward_accuracy", scorer, measure)
    for judge, values in run["judge_accuracy"].items():
        if values.get("across_clear") and judge not in run["reward_accuracy"]:
            yield f"Accuracy of {judge} ({_asked('across_clear')})", _share("judge_accuracy", judge, "across_clear")
    for row in run["win_rates"]:
        yield f"{row['policy']} preferred to {row['baseline']} by {row['judge']}", _wins(row["judge"])
    if {"sft", "ppo"} <= run["policies"].keys():
        yield from _policy_rows()


def _policy_rows() -> Iterator[Row]:
    yield "KL(ppo ‖ sft), nats a response", lambda run: number(run["policies"]["ppo"]["kl"])
    yield "Entropy, nats a token, sft → ppo", lambda run: _both(run, "entropy", number)
    yield "Length, tokens, sft → ppo", lambda run: _both(run, "length", lambda x: number(x, 1))
    yield "Distinct 2-grams, sft → ppo", lambda run: _both(run, "distinct_2", lambda x: number(x, 3))
    yield "Responses that end by themselves, sft → ppo", lambda run: _both(run, "eos_rate", percent)


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
    return f"{shown} ({change(losses['ppo'], losses['sft'])})" if losses.keys() >= {"sft", "ppo"} else shown


def _both(run: Result, key: str, show: Callable[[float], str]) -> str:
    before, after = (_number(run["policies"][name][key]) for name in ("sft", "ppo"))
    changed = f" ({change(after, before)})" if key in ("length", "distinct_2") else ""
    return f"{show(before)} → {show(after)}{changed}"
