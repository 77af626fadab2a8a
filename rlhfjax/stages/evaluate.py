"""The evaluation: held-out losses by stage, reward-model accuracy, policies compared by judges, samples, the report."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms.likelihood import token_log_probs, token_scores
from rlhfjax.algorithms.packing import on_packed
from rlhfjax.config import schema
from rlhfjax.config.recipe import FACTS, compared, stages_of
from rlhfjax.data.batches import right_padded
from rlhfjax.data.datasets import open_source
from rlhfjax.data.pipeline import Batches
from rlhfjax.evaluation.calibration import calibration
from rlhfjax.evaluation.judges import Judge, fit_ridge_judge, tfidf_ridge_baseline, vader_judge
from rlhfjax.evaluation.pairwise import RatedTexts
from rlhfjax.evaluation.report import write_report
from rlhfjax.evaluation.results import AccuracyRow, Calibration, Evaluation, PolicyRow, Response, Sample
from rlhfjax.evaluation.rows import REWARD_MODEL, accuracy_row, comparison_row, human_rows, policy_row, win_row
from rlhfjax.evaluation.run_data import read_run
from rlhfjax.functional.masking import at_last
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import SequenceModel
from rlhfjax.sharding import constrain_parts, place_share, processes
from rlhfjax.sharding.sampling import split_caches
from rlhfjax.stages.compilation import training_options
from rlhfjax.stages.data import held_out, open_batches
from rlhfjax.stages.exact_match import exact_match
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.meters import loss_meter
from rlhfjax.stages.models import sampler_of, sampling_params
from rlhfjax.stages.parts import rows_at_a_time
from rlhfjax.stages.run_directory import saved_or_stopped, write_text
from rlhfjax.target import Target, current
from rlhfjax.text.chat import beginning
from rlhfjax.training.checkpoint import COMPLETE
from rlhfjax.training.supervision import Watch
from rlhfjax.types import Params, TokenBatch

SHOWN_SAMPLES = 24


def evaluate(job: Job) -> Facts:
    """Measure every model of the run and write evaluation.json and report.html.

    Nothing is kept of an evaluation that is stopped, so that it stops at once.
    """
    with closing(job.watch()) as watch:
        return _evaluate(job, watch)


def _evaluate(job: Job, watch: Watch) -> Facts:
    began = time.monotonic()
    models = {stage: job.load(stage) for stage in stages_of(job.run) if FACTS[stage].role == "policy"}
    opened = open_batches(job)
    losses = {}
    for stage, (model, params) in models.items():
        watch.begin(stage, 0)
        watch.poll()
        measure = loss_meter(job, model)
        losses[stage] = {name: measure(params, data) for name, data in held_out(opened).items()}
    policies = _policies(job, models)
    responses = {stage: respond(job, opened["train"], policies, stage, watch) for stage in policies}
    watch.begin("judges", 0)
    scorer = _RewardScorer(job) if job.run.stages.reward else None
    accuracy, judge_accuracy, judges, calibrated = _accuracies(job, scorer)
    rows = []
    if len(policies) == 2:
        (before, theirs), (last, ours) = responses.items()
        rows = [
            win_row(judge, last, ours.texts, before, theirs.texts, ours.prompts, seed=job.run.seed) for judge in judges
        ]
    result = Evaluation(
        seed=job.run.seed,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        hardware=hardware(),
        stage_seconds=_seconds(job) | {job.stage: round(time.monotonic() - began, 1)},
        heldout_losses=losses,
        reward_accuracy=accuracy,
        calibration=calibrated,
        judge_accuracy=judge_accuracy,
        win_rates=rows,
        exact_match={stage: exact_match(job, *policies[stage]) for stage in policies} if job.config.exact_match else {},
        policies=[_policy_row(stage, made, scored=bool(scorer)) for stage, made in responses.items()],
        samples=_samples(responses, judges),
    )
    processes.by_first(partial(_write, job, result), "evaluation")
    return {}


def _policies(job: Job, models: dict[str, tuple[SequenceModel, Params]]) -> dict[str, tuple[SequenceModel, Params]]:
    """The last policy, after the one that it started from: an earlier stage's, or the model's checkpoint."""
    found = {stage: models[stage] for stage in compared(job.run)}
    if len(found) == 1 and any(FACTS[stage].aligns for stage in found):
        return {"checkpoint": job.policy_from()} | found
    return found


def _seconds(job: Job) -> dict[str, float]:
    """The wall time of every stage before this one."""
    done = (stage for stage in stages_of(job.run) if stage != job.stage)
    return {stage: json.loads((job.run_dir / stage / COMPLETE).read_text("utf-8"))["seconds"] for stage in done}


def _write(job: Job, result: Evaluation) -> None:
    with saved_or_stopped(job.dir):
        write_text(job.dir / "evaluation.json", result.to_json())
        write_report(job.run_dir / "report.html", read_run(job.run_dir))


@dataclass
class Responses:
    """A policy's responses to the evaluation prompts; `texts` are what judges read, prompt included; `answers` are
    the responses alone.

    `kl` is nats against the first of the policies, `entropies` nats, both summed over a response; `scores` the reward
    model's.
    """

    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


def respond(
    job: Job, prompts: Batches, policies: dict[str, tuple[SequenceModel, Params]], stage: str, watch: Watch
) -> Responses:
    """One response to each of the first `samples` evaluation prompts, drawn by the policy of `stage`."""
    c: schema.Evaluate = job.config
    made = Responses()
    key = jax.random.fold_in(job.key("samples"), list(policies).index(stage))
    sample = _sampler(job, policies, stage)
    for step in range(-(-c.samples // c.batch.size)):
        watch.begin(f"responses/{stage}", step)
        watch.poll()
        rollout, kl, entropies, scores = processes.fetch(sample(place_share(job.mesh, prompts[step]), key))
        for i in range(min(c.batch.size, c.samples - len(made.texts))):
            prompt = rollout.prompt[i][rollout.prompt_mask[i]].tolist()
            response = rollout.response[i][rollout.response_mask[i]].tolist()
            made.prompts.append(job.tokenizer.decode(prompt))
            made.texts.append(_judged_text(c, job.tokenizer.decode(prompt + response)))
            made.answers.append(job.tokenizer.decode_continuation(response, prompt[-1]))
            made.tokens.append(response)
            made.ended.append(bool(rollout.finished[i]))
            made.kl.append(float(kl[i]))
            made.scores.append(float(scores[i]))
            made.entropies.append(float(entropies[i]))
    return made


def _sampler(job: Job, policies: dict[str, tuple[SequenceModel, Params]], stage: str) -> Callable:
    """A compiled function of (prompts, key): rollout, KL and summed entropy of each response, and its score.

    KL and entropy are of the policies at the temperature that the responses are drawn at (greedy: at 1), so that the
    mean over responses is that of the distribution they come from; filters are left out of them.
    """
    model, params = policies[stage]
    reference_model, reference = next(iter(policies.values()))
    reward_model, reward = job.load("reward") if job.run.stages.reward else (model, None)
    settings = sampling_params(job.config.sampling, job.tokenizer)
    sampler = split_caches(job.mesh, sampler_of(model, job.config.sampling))
    part = rows_at_a_time(job.config, job.mesh)
    models = sampler, model, reference_model, reward_model
    return partial(_program(*models, settings, part, job.mesh, current()), params, reference, reward)


@lru_cache(maxsize=4)  # policies of one shape share what is traced and compiled
def _program(
    sampler: Any,
    model: SequenceModel,
    reference_model: SequenceModel,
    reward_model: SequenceModel,
    settings: SamplingParams,
    part: int,
    mesh: jax.sharding.Mesh,
    target: Target,  # whose options it is compiled with
) -> Callable:
    how: dict[str, Any] = {"temperature": settings.temperature or 1.0, "gather": mesh.size == 1}

    @partial(jax.jit, compiler_options=training_options(target))
    def sample(params, reference, reward, batch, key):
        made = generate(sampler, params, batch, key, settings)

        def of_rows(rows: TokenBatch) -> tuple[jax.Array, ...]:
            log_probs, entropies = token_log_probs(model, params, rows, **how)
            kl = log_probs - token_log_probs(reference_model, reference, rows, **how)[0]
            scores = jnp.zeros_like(kl) if reward is None else token_scores(reward_model, reward, rows)
            return kl, entropies, scores

        kl, entropies, scores = on_packed(part, made, of_rows, partial(constrain_parts, mesh))
        return made, kl.sum(axis=1), entropies.sum(axis=1), at_last(scores, made.response_mask)

    return sample


def _judged_text(c: schema.Evaluate, text: str) -> str:
    # The ratings are of bare texts; what the prompts put before them is not part of what is judged.
    return text.removeprefix(c.ratings.prefix).strip() if c.ratings else text


class _RewardScorer:
    """Scores of (prompt, response) pairs by the run's reward model, in batches of one shape."""

    def __init__(self, job: Job):
        self.job, (self.model, self.params) = job, job.load("reward")
        self.score = jax.jit(self.model.scores)
        facts = json.loads((job.run_dir / "reward" / COMPLETE).read_text(encoding="utf-8"))
        self.gain: float = facts.get("normalized_gain", 1.0)  # what normalisation multiplied the scores with

    def __call__(self, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> np.ndarray:
        """One score per pair of ids, the response with its end; equal pairs are computed once.

        A text beyond the context is read without its last words, and that is told.
        """
        distinct = list(dict.fromkeys(zip(prompts, responses, strict=True)))
        t, size, limit = self.job.tokenizer, 64, self.model.config.context
        whole = [[*prompt, *response] for prompt, response in distinct]
        if cut := sum(len(row) > limit for row in whole):
            self.job.report(
                f"evaluate: the reward model reads {cut:,} of {len(whole):,} comparisons' and ratings' texts without "
                f"their end, which is beyond its context of {limit} tokens"
            )
        rows = [[*row[:-1][: limit - 1], row[-1]] for row in whole]
        order = np.argsort([len(row) for row in rows], kind="stable")  # batches of like lengths need less padding
        scores = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), size):
            chosen = order[start : start + size]
            length = min(-(-len(rows[chosen[-1]]) // 32) * 32, limit)
            filler = [[t.eos_id] * length] * (size - len(chosen) + 1)  # also sets the padded length
            tokens, mask = right_padded([rows[i] for i in chosen] + filler, t.pad_id)
            lengths = np.ones(size + 1, np.int32)
            lengths[: len(chosen)] = [min(len(distinct[i][0]), len(rows[i]) - 1) for i in chosen]
            scores[chosen] = processes.fetch(self.score(self.params, tokens, mask, lengths))[: len(chosen)]
        place = {pair: i for i, pair in enumerate(distinct)}
        return scores[[place[pair] for pair in zip(prompts, responses, strict=True)]]


def _accuracies(
    job: Job, scorer: _RewardScorer | None
) -> tuple[list[AccuracyRow], list[AccuracyRow], list[Judge], Calibration | None]:
    """Accuracy of reward model, baseline, lexicon and people on the same held-out pairs; of the judges; calibration."""
    c: schema.Evaluate = job.config
    seed, judges, accuracy, judge_accuracy, calibrated = job.run.seed, [], [], [], None
    if c.ratings:
        judged, based, tested = (
            list(open_source(entry.source, entry.split, job.data_dir, kind="rated_text"))
            for entry in (c.ratings.judge, c.ratings.baseline, c.ratings.test)
        )
        texts = [row["text"] for row in tested]
        rated = RatedTexts.from_rows(
            [row["ratings"] for row in tested], [row["batch"] for row in tested], [row["heldout"] for row in tested]
        )
        ridge = fit_ridge_judge([row["text"] for row in judged], [np.mean(row["ratings"]) for row in judged], seed)
        baseline = tfidf_ridge_baseline([row["text"] for row in based], [row["mean_train"] for row in based], seed)
        lexicon = vader_judge()
        judges = [ridge, lexicon]
        judge_accuracy = [accuracy_row(judge.name, judge(texts), rated, seed) for judge in judges]
        if scorer:
            t = job.tokenizer
            prefix = (*beginning(t), *t.encode(c.ratings.prefix))
            answers = [(*t.encode_continuation(f" {text}", after=prefix[-1]), t.eos_id) for text in texts]
            scores = scorer([prefix] * len(texts), answers)
            accuracy = [accuracy_row(REWARD_MODEL, scores, rated, seed)]
            calibrated = calibration(scores, rated, scorer.gain)
        accuracy += [
            accuracy_row(baseline.name, baseline(texts), rated, seed),
            judge_accuracy[1],
            *human_rows(rated, seed),
        ]
    if scorer and c.comparisons:
        compared = job.reader.comparison_ids(c.comparisons, c.batch)
        pairs = [(prompt, response) for prompt, responses, _ in compared for response in responses]
        scores = scorer([prompt for prompt, _ in pairs], [response for _, response in pairs])
        asked, ranks = [prompt for prompt, *_ in compared], [ranks for *_, ranks in compared]
        row = comparison_row(REWARD_MODEL, scores, ranks, asked, seed)
        others = [other for other in accuracy if other.name != REWARD_MODEL]
        rated_values = next((other.values for other in accuracy if other.name == REWARD_MODEL), {})
        accuracy = [AccuracyRow(REWARD_MODEL, rated_values | row.values), *others]
    return accuracy, judge_accuracy, judges, calibrated


def _policy_row(stage: str, made: Responses, scored: bool) -> PolicyRow:
    return policy_row(
        stage,
        made.tokens,
        made.ended,
        words=[text.split() for text in made.answers],
        kl=made.kl,
        entropy=made.entropies,
        reward=made.scores if scored else None,
        prompts=made.prompts,
    )


def _samples(responses: dict[str, Responses], judges: list[Judge]) -> list[Sample]:
    if not responses:
        return []
    prompts = next(iter(responses.values())).prompts[:SHOWN_SAMPLES]
    shown = {stage: made.texts[:SHOWN_SAMPLES] for stage, made in responses.items()}
    verdicts = {stage: {judge.name: judge(texts) for judge in judges} for stage, texts in shown.items()}

    def response(stage: str, i: int) -> Response:
        return Response(shown[stage][i], {name: float(scores[i]) for name, scores in verdicts[stage].items()})

    return [Sample(prompt, {stage: response(stage, i) for stage in responses}) for i, prompt in enumerate(prompts)]


def hardware() -> str:
    """What the numbers were measured on."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{cores} CPU core{'s' if cores != 1 else ''} ({platform.machine()})"
    return f"{len(devices)} x {devices[0].device_kind}"
