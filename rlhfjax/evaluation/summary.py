"""The run in six lines: what each stage took, and the one figure that says how it went."""

from dataclasses import dataclass

from rlhfjax.evaluation.display import NOT_RUN, duration, number, percent, percent_interval
from rlhfjax.evaluation.rows import REWARD_MODEL
from rlhfjax.evaluation.run_data import ReportData


@dataclass(frozen=True)
class SummaryRow:
    """A stage, its wall time, its key figure; all text."""

    stage: str
    time: str
    figure: str


def summary_rows(run: ReportData) -> list[SummaryRow]:
    """One row for each stage of the recipe and each further stage of the run."""
    seconds = run.evaluation.stage_seconds if run.evaluation else {}
    extra = [stage for stage in seconds if stage not in run.stages]
    return [
        SummaryRow(stage, duration(seconds.get(stage)), _figure(run, stage, stage in seconds))
        for stage in [*run.stages, *extra]
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
    _, validation = run.series(stage, "loss/validation")
    if not train.size:
        return ""
    figure = f"loss {number(train[0])} → {number(train[-1])} nats a token"
    return f"{figure}, held out {number(validation[-1])}" if validation.size else figure


def _reward_figure(run: ReportData) -> str:
    rows = run.evaluation.reward_accuracy if run.evaluation else []
    model = next((row for row in rows if row.name == REWARD_MODEL), None)
    for measure, said in (("within_heldout", "held-out labelers"), ("comparisons", "held-out comparisons")):
        if model and model.values.get(measure):
            return f"orders {percent_interval(model.values[measure])} of pairs as {said}"
    _, accuracy = run.series("reward", "eval/rm/accuracy", "train/rm/accuracy")
    return f"orders {percent(accuracy[-1])} of pairs right" if accuracy.size else ""


def _online_figure(run: ReportData, stage: str) -> str:
    _, kl = run.series(stage, "objective/kl")
    _, scores = run.series(stage, "objective/scores")
    figure = f"KL {number(kl[-1], 1)} nats a response"
    return f"score {number(scores[0])} → {number(scores[-1])}, {figure}" if scores.size else figure


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
