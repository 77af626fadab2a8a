"""The sections of the report: each function turns a run into figures and tables, or into nothing.

A section without figures, tables or samples is one that did not run, and the page says so.
"""

from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from rlhfjax.config.recipe import FACTS
from rlhfjax.evaluation.report import plots
from rlhfjax.evaluation.report.display import NONE, number, number_interval, percent, percent_interval
from rlhfjax.evaluation.report.planned import planned_rows
from rlhfjax.evaluation.report.run_data import ReportData, unit_of
from rlhfjax.evaluation.report.summary import summary_rows
from rlhfjax.evaluation.report.time import restart_rows, spent_rows, steps_line
from rlhfjax.evaluation.results import AccuracyRow, Evaluation, PolicyRow, Sample
from rlhfjax.evaluation.rows import MEASURES

_LOSSES = {"train": ("loss/train", "train/rm/loss"), "held out": ("loss/validation", "eval/rm/loss")}
_ONLINE = (  # metric, title, unit
    ("objective/scores", "{score}", "score"),
    ("objective/kl", "KL from the reference", "nats per response"),
    ("objective/rlhf_reward", "Score less KL penalty", "reward"),
    ("objective/entropy", "Entropy of the policy", "nats"),
    ("objective/length", "Response length", "tokens"),
    ("objective/eos_rate", "Responses that end by themselves", "share"),
)
_REWARD = "objective/reward/"  # before the name of each, where a score is the sum of several


@dataclass(frozen=True)
class Plot:
    """One figure and its heading."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """A header and rows of text; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, and whatever there is to show."""

    title: str
    note: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def ran(self) -> bool:
        return bool(self.plots or self.tables or self.samples)


def sections(run: ReportData) -> list[Section]:
    """All sections of the report in the order of the recipe."""
    evaluation = run.evaluation or Evaluation(seed=0, date="", hardware="")
    planned = [stage for stage in run.stages if stage in FACTS and FACTS[stage].online]
    online = run.online_stages or (planned if run.recipe else planned[:1])
    return [
        _summary(run),
        *([_time(run)] if run.time and run.time.wall else []),
        _losses(run),
        *[_online(run, stage) for stage in online],
        *[_frontier(run, stage) for stage in online],
        _reward_accuracy(evaluation),
        _win_rates(evaluation),
        _policies(evaluation),
        _heldout(evaluation),
        *([_exact_match(evaluation)] if evaluation.exact_match else []),
        _samples(evaluation),
    ]


def _summary(run: ReportData) -> Section:
    rows = [[row.stage, row.time, row.figure] for row in summary_rows(run)]
    return Section("Summary", "", tables=[Table(["Stage", "Time", "Key figure"], rows)])


def _time(run: ReportData) -> Section:
    assert run.time
    tables = [Table(["Time", "Wall time", "Share"], spent_rows(run.time))]
    if restarts := restart_rows(run.time):
        tables.append(Table(["Start", "The one before", "To the first new step"], restarts))
    if planned := planned_rows(run.attempts, run.metrics):
        tables.append(Table(["Step", "Planned, s", "Measured, s", "Ratio"], planned))
    note = (
        f"Where the time since the first start went, until this page was written: {steps_line(run.time)}. Work "
        "that was done again after a restart, and the time until the restart, are lost to what ended the start before."
    )
    return Section("Time", note, tables=tables)


def _losses(run: ReportData) -> Section:
    found = []
    for stage in run.stages:
        series = {label: run.series(stage, *names) for label, names in _LOSSES.items()}
        series = {label: points for label, points in series.items() if points[0].size}
        if series:
            figure = plots.loss_curves(series, unit_of(stage))
            found.append(_plot(stage, figure, f"loss-{stage}", f"Loss of the {stage} stage over its steps"))
    note = (
        "Training loss by step (thin: as logged, thick: running mean) and loss on held-out data, of the weights that "
        "the stage would hand on at that step: of their moving average where it keeps one."
    )
    return Section("Losses", note, found)


def _online(run: ReportData, stage: str) -> Section:
    found, rewards = [], _rewards(run, stage)
    each = ((_REWARD + name, f"Reward: {name}", "reward") for name in rewards)
    for i, (metric, title, unit) in enumerate((*_ONLINE, *each)):
        title = title.format(score=_score(rewards)) if metric == "objective/scores" else title
        steps, values = run.series(stage, metric)
        if steps.size:
            figure = plots.metric_curve(steps, values, unit, i)
            found.append(_plot(title, figure, f"{stage}-{i}", f"{title} over the steps of {stage}"))
    note = (
        "A score that rises while entropy, length or the share of responses that end falls is a policy that found a "
        "weakness of its reward. All of it is of the policy that samples and trains. Where the stage keeps a "
        "moving average, that is what it hands on, and what the other sections measure."
    )
    return Section(f"Online training: {stage}", note, found)


def _rewards(run: ReportData, stage: str) -> list[str]:
    """The rewards of which the score of a stage is the weighted sum; none where the reward model's is all."""
    names = dict.fromkeys(name for row in run.metrics.get(stage, []) for name in row if name.startswith(_REWARD))
    return [name.removeprefix(_REWARD) for name in names]


def _score(rewards: list[str]) -> str:
    return "Weighted sum of the rewards" if rewards else "Reward model score"


def _frontier(run: ReportData, stage: str) -> Section:
    by_step = dict(zip(*run.series(stage, "objective/kl"), strict=True))
    steps, scores = run.series(stage, "objective/scores")
    kept = [i for i, step in enumerate(steps) if step in by_step]
    found = []
    if kept:
        steps, scores = steps[kept], scores[kept]
        title = _score(_rewards(run, stage))
        figure = plots.reward_against_kl(steps, np.array([by_step[step] for step in steps]), scores, title.lower())
        found.append(_plot("", figure, f"{stage}-frontier", f"{title} against KL, by step"))
    note = "What the policy paid in divergence from the supervised model for its score; amber is early, violet late."
    return Section(f"Reward against KL: {stage}", note, found)


def _reward_accuracy(evaluation: Evaluation) -> Section:
    note = (
        "Share of pairs of unseen texts ordered as people ordered them, with 95 % intervals over batches. People agree "
        "with each other only so far: one labeler, asked what the scorers are asked, and the mean of the others, which "
        "knows what other people gave each text, and which no reader of texts can be expected to beat. 50 % is a coin."
    )
    rows = evaluation.reward_accuracy
    if not _measures(rows):
        return Section("Reward model", note)
    figure = plots.accuracy_bars(rows, _measures(rows))
    shown = [_plot("", figure, "accuracy", "Share of human pairs ordered right, by scorer and measure")]
    tables = [_accuracy_table(rows)]
    if (measured := evaluation.calibration) is not None:
        described = "Share of held-out labelers who agree, by the probability that the reward model gives"
        shown.append(_plot("Calibration", plots.reliability(measured), "calibration", described))
        header = ["Calibration of the reward model", "Figure"]
        values = [["Expected calibration error", percent(measured.error)], ["Slope", number(measured.slope, 2)]]
        tables.append(Table(header, values))
    return Section("Reward model", note, shown, tables)


def _win_rates(evaluation: Evaluation) -> Section:
    note = (
        "How often a judge that took no part in training prefers the later policy on the same prompt (a tie is one "
        "half), with 95 % intervals over prompts; how many pairs are ties; and how often each judge orders human pairs "
        "right."
    )
    wins = evaluation.win_rates
    if not wins:
        return Section("Win rates", note)
    figure = plots.win_rate_bars(wins)
    header = ["Judge", "Match", "Win rate", "Ties", "Mean score after", "Mean score before"]
    rows = [
        [
            row.judge,
            f"{row.policy} over {row.baseline}",
            percent_interval(row.win),
            percent(row.ties),
            number(row.policy_mean),
            number(row.baseline_mean),
        ]
        for row in wins
    ]
    judged = [_accuracy_table(evaluation.judge_accuracy)] if _measures(evaluation.judge_accuracy) else []
    shown = [_plot("", figure, "wins", "Win rates with intervals, by judge")]
    return Section("Win rates", note, shown, [Table(header, rows), *judged])


def _policies(evaluation: Evaluation) -> Section:
    columns: dict[str, tuple[str, int | None]] = {  # figure, decimals (None: a share)
        "Reward": ("reward", 2),
        "KL, nats per response": ("kl", 2),
        "Entropy, nats per token": ("entropy", 2),
        "Length, tokens": ("length", 1),
        "Distinct-1": ("distinct_1", 3),
        "Distinct-2": ("distinct_2", 3),
        "Repetition": ("repetition", None),
        "Ends by itself": ("eos_rate", None),
    }
    rows = [
        [row.name, str(row.responses), NONE if row.prompts is None else str(row.prompts)]
        + [_figure(row, *shown) for shown in columns.values()]
        for row in evaluation.policies
    ]
    note = (
        "Responses to the evaluation prompts, how many of these are different, and 95 % intervals over prompts. "
        "Distinct-n is the share of different n-grams over all responses."
    )
    return Section(
        "Length and diversity", note, tables=[Table(["Policy", "Responses", "Prompts", *columns], rows)] if rows else []
    )


def _figure(row: PolicyRow, name: str, digits: int | None) -> str:
    value, interval = getattr(row, name), row.intervals.get(name)
    if digits is None:
        return percent_interval(interval) if interval else percent(value)
    return number_interval(interval, digits) if interval else number(value, digits)


def _heldout(evaluation: Evaluation) -> Section:
    note = (
        "Loss on text that no stage saw, after each stage, with the change from the stage before. What the last stage "
        "adds is the alignment tax (Ouyang et al. 2022)."
    )
    losses = {stage: by_set for stage, by_set in evaluation.heldout_losses.items() if by_set}
    if not losses:
        return Section("Held-out loss", note)
    figure = plots.heldout_loss_bars(losses)
    return Section("Held-out loss", note, [_plot("", figure, "heldout", "Held-out loss by text and stage")])


def _exact_match(evaluation: Evaluation) -> Section:
    note = (
        "Share of held-out demonstrations that the best response, found by beam search, repeats to the letter; of both "
        "only the last part, where the configuration says what stands before it (exact_match.after)."
    )
    sets = list(dict.fromkeys(name for by_set in evaluation.exact_match.values() for name in by_set))
    rows = [[stage, *(percent(by_set.get(name)) for name in sets)] for stage, by_set in evaluation.exact_match.items()]
    return Section("Exact match", note, tables=[Table(["policy", *sets], rows)])


def _samples(evaluation: Evaluation) -> Section:
    note = "The same prompts answered by each policy, with the judges' scores."
    return Section("Before and after", note, samples=evaluation.samples)


def _measures(rows: list[AccuracyRow]) -> dict[str, str]:
    """The measures that any of the rows has, with what they are called on the page."""
    keys = dict.fromkeys(key for row in rows for key, value in row.values.items() if value is not None)
    return {key: MEASURES.get(key, key) for key in keys}


def _accuracy_table(rows: list[AccuracyRow]) -> Table:
    measures = _measures(rows)
    body = [[row.name, *(percent_interval(row.values.get(key)) for key in measures)] for row in rows]
    return Table(["Who orders pairs", *measures.values()], body)


def _plot(title: str, figure: Figure, name: str, description: str) -> Plot:
    return Plot(title, plots.to_svg(figure, name, description))
