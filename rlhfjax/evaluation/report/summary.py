"""The run in a line per stage: what it took, and the one figure that says how it went."""

from dataclasses import dataclass

from rlhfjax.evaluation.report.display import NOT_RUN, duration, number, percent, percent_interval
from rlhfjax.evaluation.report.run_data import ReportData, unit_of
from rlhfjax.evaluation.rows import REWARD_MODEL


@dataclass(frozen=True)
class SummaryRow:
    """A stage, its wall time, its key figure; all text."""

    stage: str
    time: str
    figure: str


def summary_rows(run: ReportData) -> list[SummaryRow]:
    """One row for each stage of the recipe and each further stage of the run."""
    seconds = run.evaluation.stage_seconds if run.evaluation else {}
    return [
        SummaryRow(stage, duration(seconds.get(stage)), _figure(run, stage, stage in seconds)) for stage in run.stages
    ]


def _figure(run: ReportData, stage: str, timed: bool) -> str:
    if stage == "evaluate":
        return _evaluation_figure(run)
    if stage in run.online_stages:
        return _online_figure(run, stage)
    figure = _reward_figure(run) if stage == "reward" else _loss_figure(run, stage)
    return figure or ("done" if timed or run.metrics.get(stage) else NOT_RUN)


def _loss_figure(run: ReportData, stage: str) -> str:
    _, train = run.series(stage, "loss/train")
    if not train.size:
        return ""
    figure = f"loss {number(train[0])} → {number(train[-1])} {unit_of(stage)}"
    if (held_out := _of_served(run, stage, "loss/validation")) is not None:
        return f"{figure}, held out {number(held_out)}"
    ordered = _of_served(run, stage, f"eval/{stage}/accuracy")
    return figure if ordered is None else f"{figure}, orders {percent(ordered)} of held-out pairs right"


def _of_served(run: ReportData, stage: str, metric: str) -> float | None:
    """The metric at the step that the stage hands on, which need not be its last; at the last where that is unknown."""
    steps, values = run.series(stage, metric)
    if not values.size:
        return None
    return float(values[steps == run.served[stage]][-1] if run.served.get(stage) in steps else values[-1])


def _reward_figure(run: ReportData) -> str:
    rows = run.evaluation.reward_accuracy if run.evaluation else []
    model = next((row for row in rows if row.name == REWARD_MODEL), None)
    for measure, said in (("within_heldout", "held-out labelers"), ("comparisons", "held-out comparisons")):
        if model and model.values.get(measure):
            return f"orders {percent_interval(model.values[measure])} of pairs as {said}"
    held_out, (_, training) = _of_served(run, "reward", "eval/rm/accuracy"), run.series("reward", "train/rm/accuracy")
    if held_out is not None:
        return f"orders {percent(held_out)} of held-out pairs right"
    return f"orders {percent(training[-1])} of its last training pairs right" if training.size else ""


def _online_figure(run: ReportData, stage: str) -> str:
    """What the policy did that sampled in training, and what the one does that was handed on, where it was evaluated.

    The two differ by the moving average, by the prompts and by the sampling settings.
    """
    _, kl = run.series(stage, "objective/kl")
    _, scores = run.series(stage, "objective/scores")
    figure = f"KL {number(kl[-1], 1)} nats per response"
    figure = f"score {number(scores[0])} → {number(scores[-1])}, {figure}" if scores.size else figure
    rows = run.evaluation.policies if run.evaluation else []
    served = next((row for row in rows if row.name == stage), None)
    if served is None or served.kl is None:
        return f"{figure}, in training"
    score = "" if served.reward is None else f"score {number(served.reward)}, "
    return f"{figure}, in training; served: {score}KL {number(served.kl, 1)}"


def _evaluation_figure(run: ReportData) -> str:
    if run.evaluation is None:
        return NOT_RUN
    wins = [f"{percent_interval(row.win)} ({row.judge})" for row in run.evaluation.win_rates]
    if not wins:
        exact = [
            f"{stage} repeats {percent(share)} of {name} to the letter"
            for stage, by_set in run.evaluation.exact_match.items()
            for name, share in by_set.items()
        ]
        return ", ".join(exact) or "done"
    first = run.evaluation.win_rates[0]
    return f"{first.policy} beats {first.baseline}: " + ", ".join(wins)
