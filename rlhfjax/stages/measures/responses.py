"""Responses of the policies that are compared, with KL, entropy and score, and what is told of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.likelihood import token_log_probs, token_scores
from rlhfjax.algorithms.packing import on_packed
from rlhfjax.config import schema
from rlhfjax.data.by_step import Batches
from rlhfjax.evaluation.judges import Judge
from rlhfjax.evaluation.results import PolicyRow, Response, Sample
from rlhfjax.evaluation.rows import policy_row
from rlhfjax.functional.masking import at_last
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.sharding import constrain_parts, place_share
from rlhfjax.sharding.sampling import sampling_on
from rlhfjax.stages.compilation import training_options
from rlhfjax.stages.job import Job
from rlhfjax.stages.models import sampler_of, sampling_params
from rlhfjax.stages.packed_rows import rows_at_a_time
from rlhfjax.stages.starts import Started
from rlhfjax.target import Target, current
from rlhfjax.training.supervision import Watch
from rlhfjax.types import TokenBatch

SHOWN_SAMPLES = 24


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


def respond(job: Job, prompts: Batches, policies: dict[str, Started], stage: str, watch: Watch) -> Responses:
    """One response to each of the first `samples` evaluation prompts, drawn by the policy of `stage`."""
    c: schema.Evaluate = job.config
    made = Responses()
    key = jax.random.fold_in(job.key("samples"), list(policies).index(stage))
    reference, settings = next(iter(policies.values())), sampling_params(c.sampling, job.tokenizer)
    reward = job.load("reward") if job.run.stages.reward else None
    sample = sampler(c, job.mesh, policies[stage], reference, reward, settings)
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


def sampler(
    c: schema.Evaluate,
    mesh: jax.sharding.Mesh,
    policy: Started,
    reference: Started,
    reward: Started | None,
    settings: SamplingParams,
) -> partial:
    """A jitted function of (prompts, key): rollout, KL and summed entropy of each response, and its score.

    KL and entropy are of the policies at the temperature that the responses are drawn at (greedy: at 1), so that the
    mean over responses is that of the distribution they come from; filters are left out of them.
    """
    model, params = policy
    reward_model, scoring = reward or (model, None)
    models = sampler_of(model, c.sampling), model, reference[0], reward_model
    program = _program(*models, settings, rows_at_a_time(c, mesh), mesh, current())
    return partial(program, params, reference[1], scoring)


@lru_cache(maxsize=4)  # policies of one shape share what is traced and compiled
def _program(
    sampling_model: Any,
    model: SequenceModel,
    reference_model: SequenceModel,
    reward_model: SequenceModel,
    settings: SamplingParams,
    part: int,
    mesh: jax.sharding.Mesh,
    target: Target,  # whose options it is compiled with
) -> Callable:
    how: dict[str, Any] = {"temperature": settings.temperature or 1.0}

    @partial(jax.jit, compiler_options=training_options(mesh, target))
    def sample(params, reference, reward, batch, key):
        made = sampling_on(mesh, generate)(sampling_model, params, batch, key, settings)

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


def row_of(stage: str, made: Responses, scored: bool) -> PolicyRow:
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


def samples_of(responses: dict[str, Responses], judges: list[Judge]) -> list[Sample]:
    if not responses:
        return []
    prompts = next(iter(responses.values())).prompts[:SHOWN_SAMPLES]
    shown = {stage: made.texts[:SHOWN_SAMPLES] for stage, made in responses.items()}
    verdicts = {stage: {judge.name: judge(texts) for judge in judges} for stage, texts in shown.items()}

    def response(stage: str, i: int) -> Response:
        return Response(shown[stage][i], {name: float(scores[i]) for name, scores in verdicts[stage].items()})

    return [Sample(prompt, {stage: response(stage, i) for stage in responses}) for i, prompt in enumerate(prompts)]
