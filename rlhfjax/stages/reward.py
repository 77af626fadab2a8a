"""The reward model: trained on rankings, then centred."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import schema
from rlhfjax.data.batches import right_padded
from rlhfjax.data.by_step import Batches
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.models.heads import init_head, rescale_head, with_head
from rlhfjax.sharding.sampling import sampling_on
from rlhfjax.stages.batches import held_out, longest, open_batches
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.measures.draws import draws_of, last_sampling
from rlhfjax.stages.measures.reward_scores import RowScorer
from rlhfjax.stages.measures.validation import accuracy_meter, named
from rlhfjax.stages.objectives import reward_modelling
from rlhfjax.stages.offline import OfflineLearner, learn_offline
from rlhfjax.stages.packed_rows import ranking_packer
from rlhfjax.stages.starts import Starts
from rlhfjax.types import Params


def reward(job: Job) -> Facts:
    """The reward model: the policy's decoder with a scalar head, on K-way rankings; then its scores are centred."""
    return learn_offline(job, partial(_centred, job, longest(open_batches(job))))


def _centred(job: Job, longest: int) -> OfflineLearner:
    made = learner(job.config, job.mesh, job, longest)
    return replace(made, finish=partial(normalize_scores, job, made.model))


def learner(c: schema.Reward, mesh: jax.sharding.Mesh, starts: Starts, longest: int) -> OfflineLearner:
    """The decoder of a policy with a fresh head; the longest comparison has `longest` tokens."""
    model, policy = starts.policy_from()
    params = with_head(policy, init_head(starts.key("init"), model.config.width))
    pack = ranking_packer(c.batch, mesh, model, longest, ends=True)
    measure = accuracy_meter(mesh, reward_modelling(model, c.loss), pack)

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        return named("eval/rm/accuracy", {name: measure(params, data) for name, data in held_out(opened).items()})

    return OfflineLearner(
        role="reward",
        model=model,
        params=params,
        objective=reward_modelling(model, c.loss, c.dropout),
        meter=measure,
        validate=validate,
        pack=pack,
        shown=("train/rm/loss", "train/rm/accuracy", "eval/rm/accuracy", "perf/mfu"),
    )


def normalize_scores(job: Job, model: SequenceModel, params: Params) -> tuple[Params, Facts]:
    """Shift (and scale) the head so that the scores of reference responses have mean 0 (and deviation 1).

    The responses are people's demonstrations (Ouyang et al. 2022, C.2) or samples of the policy (Ziegler et al. 2019).
    """
    c: schema.Reward = job.config
    n = c.normalize
    if n.on == "none":
        return params, {}
    pairs = job.reader.demonstration_ids(n.data, c.batch.length, n.count, c.batch.refused)
    if n.on == "samples":
        pairs = _sampled(job, [prompt for prompt, _ in pairs])
    score = _scorer(job, model, pairs)
    before = score(params)
    spread = before.std()
    if n.scale and spread < 1e-5:  # rounding alone
        job.report(f"reward: the scores of {len(pairs)} {n.on} are all alike, so they are centred and not scaled")
    gain = 1.0 / spread if n.scale and spread >= 1e-5 else jnp.float32(1.0)
    params = params | {"head": rescale_head(params["head"], gain, -gain * before.mean())}
    after = score(params)
    return params, {
        "eval/rm/normalized_mean": float(after.mean()),
        "eval/rm/normalized_std": float(after.std()),
        "normalized_gain": float(gain),
        "normalized_on": f"{len(pairs)} {n.on}",
        "normalized_lengths": _spread([len(response) for _, response in pairs]),
    }


def _scorer(
    job: Job, model: SequenceModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> Callable[[Params], jax.Array]:
    """Scores of the pairs, whose rows the devices of the mesh share."""
    rows = [prompt + response for prompt, response in pairs]
    begins = [len(prompt) for prompt, _ in pairs]
    if job.mesh.size > 1:
        score_rows = RowScorer(job.mesh, model, job.tokenizer.pad_id)
        width = max(map(len, rows))
        return lambda params: jnp.asarray(score_rows(params, rows, begins, width))
    batch = *right_padded(rows, job.tokenizer.pad_id), np.asarray(begins, np.int32)

    def one(params: Params, row: tuple) -> jax.Array:
        return model.scores(params, *(part[None] for part in row))[0]

    score = jax.jit(lambda p, *rows: jax.lax.map(partial(one, p), rows, batch_size=64))
    return lambda params: score(params, *batch)


def _spread(lengths: list[int]) -> dict[str, float]:
    """Of responses, in tokens."""
    return {"shortest": min(lengths), "mean": round(sum(lengths) / len(lengths), 2), "longest": max(lengths)}


def _sampled(job: Job, prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    model, policy = job.policy_from("sft", "pretrain")
    length = job.config.batch.length
    draws = draws_of(last_sampling(job.run), job.tokenizer, prompts, model.config.context, length, job.mesh)
    draw = jax.jit(partial(sampling_on(job.mesh, draws.of), model))
    rollout = processes.fetch(draw(policy, job.key("samples")))
    made = zip(rollout.response[: draws.count], rollout.response_mask[: draws.count], strict=True)
    return [(prompt, response[kept].tolist()) for prompt, (response, kept) in zip(prompts, made, strict=True)]
