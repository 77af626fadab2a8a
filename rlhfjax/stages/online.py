"""The online hall: a stage whose policy learns from its own responses, whatever the algorithm."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from rlhfjax.functional import kl_estimate
from rlhfjax.host import processes
from rlhfjax.models import EncoderDecoder
from rlhfjax.models.heads import with_head
from rlhfjax.models.lora import has_adapters
from rlhfjax.stages.batches import open_batches
from rlhfjax.stages.compilation import Ahead
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Begun, Facts, Learning, Stored, meta_for, rate_of
from rlhfjax.stages.models import sampling_params
from rlhfjax.stages.online_programs import (
    OnlineLearner,
    build,
    first_state,
    first_state_shapes,
    passes_of,
    policy_average,
)
from rlhfjax.stages.rewards import HostRewards, Judges
from rlhfjax.training.flops import OnlineFlops, attended, forward_flops
from rlhfjax.training.ledger import Taken
from rlhfjax.training.online import train_online
from rlhfjax.types import OnlineState, Params, Rollout, TokenBatch, TrainState

SHOWN = (
    *("objective/scores", "objective/kl", "objective/length", "loss/ptx"),
    *("timing/rollout_share", "timing/update_share", "perf/mfu"),
)


def learn_online(job: Job, learner_of: Callable[[], OnlineLearner]) -> Facts:
    """Sample, score, estimate, update: `steps` times, from the stage's last checkpoint on.

    With `optimizer.ema_decay` the moving average of the policy is handed on. What samples is the policy itself, and the
    metrics are of that one: importance ratios and the KL penalty are those of the distribution that was sampled.
    """
    c, passes = job.config, passes_of(job.config)
    begun = Begun(learner_of)
    learner, learning = begun.learner, _learning(job, begun)
    opened: dict[str, Any] = open_batches(job)
    place = learning.place(learning.state)
    first = next(job.put(iter([opened["train"][place + learning.guard.memory.drawn]])))
    mixed = next(job.put(iter([opened["ptx"][place]]))) if c.ptx else None
    ahead, sampling = Ahead(job.stage, job.shared.get("began")), sampling_params(c.sampling, job.tokenizer)
    steps = build(c, job.mesh, learner, learning.state, sampling)
    steps = ahead.online(steps, learning.state, learner.frozen, first, mixed)
    rate, flops = rate_of(c.optimizer, c.steps * passes.steps, learner.policy), iteration_flops(c, learner, mixed)

    def keep(state: OnlineState, iteration: int, stop: bool) -> Callable[[], None] | None:
        due = iteration > learning.saved and (stop or iteration % job.run.checkpoints.every == 0)
        return (lambda: learning.save(state)) if due else None

    def sampled(iteration: int, rollout: Rollout) -> Taken:
        prompts.note(learning, iteration)
        if iteration % job.run.logging.samples_every == 0 or iteration == 1:
            learning.writer.write_samples(iteration, sample_rows(job, learner.judges, rollout))
        return prompts.taken()

    def train(state: OnlineState) -> OnlineState:
        place = learning.place(state)
        prompts.place = prompts.begin = place + learning.guard.memory.drawn
        prompts.iterations = int(state.iteration)
        return train_online(
            steps,
            state,
            learner.frozen,
            prompts.counted(learning.batches(opened["train"].iterate(prompts.place))),
            job.put(opened["ptx"].iterate(place)) if c.ptx else itertools.repeat(None),
            iterations=c.steps,
            key=job.key("steps"),
            beside=learning.beside(ahead, rate, SHOWN, flops),
            sampled=sampled,
            keep=keep,
        )

    def finish(state: OnlineState) -> Facts:
        if learning.checkpoints.latest() != c.steps:
            learning.save(state)
        facts = {"step": c.steps, "episodes": c.steps * c.batch.size, "kl_coef": float(state.kl_coef)}
        return facts | ahead.facts | learning.facts()

    prompts, records = _Prompts(opened["train"].size), opened["train"].records
    with closing(HostRewards(learner.judges, records, job.tokenizer, job.mesh, job.report)) as host:
        if host.asked:
            steps = replace(steps, judge=lambda rollout: host.begin(prompts.iterations + 1, prompts.place - 1, rollout))
        return learning.run(train, finish, opened["train"])


@dataclass
class _Prompts:
    """Where the stage is in its prompts: the next batch, of `size`. Dynamic sampling takes more than one for an
    iteration.

    `iterations` counts those whose batches have all been taken, `begin` is the first batch of the next one.
    """

    size: int
    place: int = 0
    begin: int = 0
    iterations: int = 0

    def counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.place += 1
            yield batch

    def note(self, learning: Learning, iteration: int) -> None:
        """Have what is saved after an iteration say how many batches were taken beyond the first of each."""
        self.iterations = iteration
        memory = learning.guard.memory
        learning.guard.memory = replace(memory, drawn=self.place - iteration - memory.left_out)

    def taken(self) -> Taken:
        """What the iteration that ends here read."""
        first, self.begin = self.begin, self.place
        return Taken(first * self.size, (self.place - first) * self.size)


def _learning(job: Job, begun: Begun[OnlineLearner]) -> Learning[OnlineState]:
    """The stage at its newest checkpoint."""
    learner, fresh = begun.learner, partial(first_state, job.config, job.mesh)
    meta = meta_for(job, "policy", learner.policy, averaged=policy_average(job.config) is not None)
    shapes = first_state_shapes(job.config, job.mesh, learner)
    return Learning(job, job.checkpoints(), STORED, begun, fresh, shapes, meta)


def iteration_flops(c: Any, learner: OnlineLearner, mixed: TokenBatch | None) -> OnlineFlops | None:
    """Model FLOPs of an iteration; `mixed` is the pretraining batch of one.

    None for an encoder–decoder, which reads prompt and response with different weights.
    """
    models = [*learner.models.values(), *learner.judges.models.values()]
    if any(isinstance(model, EncoderDecoder) for model in models):
        return None
    trained = {name: forward_flops(model.config, learner.params[name]) for name, model in learner.models.items()}
    scoring = learner.frozen["rewards"]
    frozen = (forward_flops(model.config, scoring[title]) for title, model in learner.judges.models.items())
    counts = (0.0, 0.0)
    if mixed is not None:
        real = mixed.segments > 0
        counts = float(real.sum()) / c.batch.epochs, float(attended(mixed.positions, real)) / c.batch.epochs
    adapted, passes = has_adapters(learner.params["policy"]), 1 + (c.sampling.old_log_probs == "recompute")
    return OnlineFlops(trained["policy"], trained.get("value"), tuple(frozen), adapted, passes, *counts)


def sample_rows(job: Job, judges: Judges, rollout: Rollout) -> list[dict[str, Any]]:
    """Rows for samples.jsonl: what was asked, what the policy that trains said, how it scored.

    The policy that is handed on may be its moving average: the evaluation samples from that one.
    """
    count = job.run.logging.samples
    some = processes.fetch(jax.tree.map(lambda x: x[:count], judges.total(rollout)[0]))
    kl = jax.device_get(kl_estimate(some.log_probs, some.ref_log_probs, "k1")) * some.response_mask
    return [
        {
            "prompt": job.tokenizer.decode(some.prompt[i][some.prompt_mask[i]].tolist()),
            "response": job.tokenizer.decode_continuation(
                some.response[i][some.response_mask[i]].tolist(), int(some.prompt[i][-1])
            ),
            "score": float(some.scores[i]),
            **({"rewards": {name: float(x[i]) for name, x in some.rewards.items()}} if some.rewards else {}),
            "kl": float(kl[i].sum()),
            "length": int(some.response_mask[i].sum()),
            "finished": bool(some.finished[i]),
        }
        for i in range(len(some.scores))
    ]


def _models(state: OnlineState) -> dict[str, Params]:
    """The models of a state as they are saved: a value head on the policy's trunk as a model of its own."""
    params, average = state.train.params, state.train.average
    value = params.get("value")
    if value is not None and set(value) == {"head"}:
        params = params | {"value": with_head(params["policy"], value["head"])}
    return params | ({} if average is None else {"average": average})


def _whole(fresh: OnlineState, models: dict[str, Params], training: tuple, skipped: Any) -> OnlineState:
    optimizer, step, kl_coef, iteration = training
    params = {name: {part: models[name][part] for part in tree} for name, tree in fresh.train.params.items()}
    return OnlineState(TrainState(params, optimizer, step, models.get("average"), skipped), kl_coef, iteration)


STORED = Stored[OnlineState](
    models=_models,
    training=lambda state: (state.train.optimizer, state.train.step, state.kl_coef, state.iteration),
    whole=_whole,
    skipped=lambda state: state.train.skipped,
    step=lambda state: int(state.iteration),
)
