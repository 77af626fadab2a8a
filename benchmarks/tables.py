"""Results of whole runs as Markdown: one table a configuration, one column a seed."""

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
    resumed = (
        f" {again} of {len(runs)} runs were resumed; times are of the last attempt at each stage." if again else ""
    )
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
                asked = f"{MEASURES[measure][0].lower()}{MEASURES[measure][1:]}"
                yield (
                    f"Pairs that the {scorer} orders as people do: {asked}",
                    _share("reward_accuracy", scorer, measure),
                )
    for judge, values in run["judge_accuracy"].items():
        if values.get("across_clear"):
            yield f"The same of the {judge} as a judge", _share("judge_accuracy", judge, "across_clear")
    for row in run["win_rates"]:
        key = row["judge"]
        yield f"Responses of {row['policy']} preferred to {row['baseline']} by the {key}", _wins(key)
    if {"sft", "ppo"} <= run["policies"].keys():
        yield from _policy_rows()


def _policy_rows() -> Iterator[Row]:
    yield "KL(ppo ‖ sft), nats a response", lambda run: number(run["policies"]["ppo"]["kl"])
    yield "Entropy, nats a token, sft → ppo", lambda run: _both(run, "entropy", number)
    yield "Length, tokens, sft → ppo", lambda run: _both(run, "length", lambda x: number(x, 1))
    yield "Distinct 2-grams, sft → ppo", lambda run: _both(run, "distinct_2", lambda x: number(x, 3))
    yield "Responses that end by themselves, sft → ppo", lambda run: _both(run, "eos_rate", percent)


def _share(table: str, scorer: str, measure: str) -> Callable[[Result], str]:
    return lambda run: _interval(run[table].get(scorer, {}).get(measure))


def _wins(judge: str) -> Callable[[Result], str]:
    return lambda run: _interval(next((row["win"] for row in run["win_rates"] if row["judge"] == judge), None))


def _interval(value: list[float] | None) -> str:
    return percent_interval(value and Interval(*value))


def _losses(run: Result, name: str) -> str:
    losses = {stage: sets[name]["nats_per_token"] for stage, sets in run["heldout_losses"].items()}
    shown = " → ".join(number(loss) for loss in losses.values())
    return f"{shown} ({change(losses['ppo'], losses['sft'])})" if losses.keys() >= {"sft", "ppo"} else shown


def _both(run: Result, key: str, show: Callable[[float], str]) -> str:
    before, after = (run["policies"][name][key] for name in ("sft", "ppo"))
    changed = f" ({change(after, before)})" if key in ("length", "distinct_2") else ""
    return f"{show(before)} → {show(after)}{changed}"
