"""The evaluation: what is measured of the models of a run at its end, and the report of it."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import jax

from rlhfjax.config.recipe import FACTS, compared, stages_of
from rlhfjax.data.by_step import Batches
from rlhfjax.evaluation.report.page import write_report
from rlhfjax.evaluation.report.run_data import read_run
from rlhfjax.evaluation.results import Evaluation, PolicyRow, WinRow
from rlhfjax.evaluation.rows import win_row
from rlhfjax.files import saved_or_stopped, write_text
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.stages.batches import held_out, open_batches
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.measures.accuracies import Accuracies, accuracies_of
from rlhfjax.stages.measures.exact_match import exact_match
from rlhfjax.stages.measures.responses import Responses, respond, row_of, samples_of
from rlhfjax.stages.measures.reward_scores import RewardScorer
from rlhfjax.stages.measures.validation import loss_meter
from rlhfjax.training.checkpoint import COMPLETE
from rlhfjax.training.supervision import Watch
from rlhfjax.types import Params


def evaluate(job: Job) -> Facts:
    """Measure every model of the run and write evaluation.json and report.html.

    Nothing is kept of an evaluation that is stopped, so that it stops at once.
    """
    with closing(job.watch()) as watch:
        return _evaluate(job, watch)


def _evaluate(job: Job, watch: Watch) -> Facts:
    began = time.monotonic()
    measured = Measured(job, watch)
    found = {name: measure(measured) for name, measure in MEASURES.items()}
    seconds = _seconds(job) | {job.stage: round(time.monotonic() - began, 1)}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    result = Evaluation(seed=job.run.seed, date=date, hardware=hardware(), stage_seconds=seconds, **found)
    processes.by_first(partial(_write, job, result), "evaluation")
    return {}


@dataclass(frozen=True)
class Measured:
    """What there is to measure of a run; each part is made when a measure first asks for it."""

    job: Job
    watch: Watch

    @cached_property
    def models(self) -> dict[str, tuple[SequenceModel, Params]]:
        """The policy of every stage."""
        return {stage: self.job.load(stage) for stage in stages_of(self.job.run) if FACTS[stage].role == "policy"}

    @cached_property
    def policies(self) -> dict[str, tuple[SequenceModel, Params]]:
        """The last policy, after the one that it started from: an earlier stage's, or the model's checkpoint."""
        found = {stage: self.models[stage] for stage in compared(self.job.run)}
        if len(found) == 1 and any(FACTS[stage].aligns for stage in found):
            return {"checkpoint": self.job.policy_from()} | found
        return found

    @cached_property
    def opened(self) -> dict[str, Batches]:
        return open_batches(self.job)

    @cached_property
    def responses(self) -> dict[str, Responses]:
        """Those of the policies that are compared, to the same prompts."""
        opened, policies = self.opened["train"], self.policies
        return {stage: respond(self.job, opened, policies, stage, self.watch) for stage in policies}

    @cached_property
    def accuracies(self) -> Accuracies:
        self.watch.begin("judges", 0)
        return accuracies_of(self.job.config, self.job.reader, self._scorer())

    def _scorer(self) -> RewardScorer | None:
        """The run's reward model, if it has one."""
        job = self.job
        if not job.run.stages.reward:
            return None
        gain = _complete(job, "reward").get("normalized_gain", 1.0)
        return RewardScorer(*job.load("reward"), job.tokenizer, gain, job.report, job.mesh)


def _losses(measured: Measured) -> dict[str, dict[str, float]]:
    """Nats per token of each policy on each held-out set."""
    losses = {}
    for stage, (model, params) in measured.models.items():
        measured.watch.begin(stage, 0)
        measured.watch.poll()
        measure = loss_meter(measured.job.mesh, model)
        losses[stage] = {name: measure(params, data) for name, data in held_out(measured.opened).items()}
    return losses


def _wins(measured: Measured) -> list[WinRow]:
    """How often each judge prefers the last policy to the one that it started from."""
    if len(measured.responses) != 2:
        return []
    (before, theirs), (last, ours) = measured.responses.items()
    seed = measured.job.run.seed
    return [
        win_row(judge, last, ours.texts, before, theirs.texts, ours.prompts, seed=seed)
        for judge in measured.accuracies.judges
    ]


def _matches(measured: Measured) -> dict[str, dict[str, float]]:
    job = measured.job
    if not job.config.exact_match:
        return {}
    how = job.config, job.reader, job.mesh
    return {stage: exact_match(*how, *policy) for stage, policy in measured.policies.items()}


def _rows(measured: Measured) -> list[PolicyRow]:
    scored = bool(measured.job.run.stages.reward)
    return [row_of(stage, made, scored=scored) for stage, made in measured.responses.items()]


# Fields of an `Evaluation` by what finds them, in the order in which that is done.
MEASURES: dict[str, Callable[[Measured], Any]] = {
    "heldout_losses": _losses,
    "policies": _rows,
    "reward_accuracy": lambda measured: measured.accuracies.reward,
    "calibration": lambda measured: measured.accuracies.calibration,
    "judge_accuracy": lambda measured: measured.accuracies.of_judges,
    "win_rates": _wins,
    "exact_match": _matches,
    "samples": lambda measured: samples_of(measured.responses, measured.accuracies.judges),
}


def _seconds(job: Job) -> dict[str, float]:
    """The wall time of every stage before this one."""
    return {stage: _complete(job, stage)["seconds"] for stage in stages_of(job.run) if stage != job.stage}


def _complete(job: Job, stage: str) -> Facts:
    """What a stage said of itself when it had finished."""
    return json.loads((job.run_dir / stage / COMPLETE).read_text(encoding="utf-8"))


def _write(job: Job, result: Evaluation) -> None:
    with saved_or_stopped(job.dir):
        write_text(job.dir / "evaluation.json", result.to_json())
        write_report(job.run_dir / "report.html", read_run(job.run_dir))


def hardware() -> str:
    """What the numbers were measured on."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{cores} CPU core{'s' if cores != 1 else ''} ({platform.machine()})"
    return f"{len(devices)} x {devices[0].device_kind}"
