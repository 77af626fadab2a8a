"""The compiled steps of the stages without their run directories: models, data and settings come from a workload."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.algorithms.likelihood import token_log_probs
from rlhfjax.config import schema
from rlhfjax.config.sections import Optimizer, RolloutBatch, Sampling
from rlhfjax.config.sections import RankedBatch as RankedSection
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.heads import init_head, with_head
from rlhfjax.sharding import make_mesh, place_batch
from rlhfjax.stages.compilation import Ahead
from rlhfjax.stages.objectives import preference_optimisation, reward_modelling, training_loss
from rlhfjax.stages.offline import OfflineLearner
from rlhfjax.stages.offline import build as build_offline
from rlhfjax.stages.online_programs import OnlineLearner, build, first_state, optimizer_of
from rlhfjax.stages.packed_rows import ranking_packer
from rlhfjax.stages.ppo import ppo_objective
from rlhfjax.stages.rewards import Judges
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import born, init_state
from rlhfjax.training.update import Pack
from rlhfjax.types import Params, PromptBatch, RankedBatch, Rollout, TokenBatch, TrainState

Work = dict[str, Any]
PAD, STOP, NEVER = 0, 2, -1  # no token is NEVER: responses have their full length
FIRST_TOKEN, STEPS = 3, 10_000


def model_of(work: Work) -> LanguageModel:
    """A Llama of the workload's shape."""
    return LanguageModel(decoder_config("llama", **work["shape"], dtype=work["dtype"]))


def fresh(mesh: jax.sharding.Mesh, model: LanguageModel, seed: int) -> Params:
    """Random parameters on the mesh."""
    return born(mesh, partial(_init, model), jax.random.key(seed))


_init = jax.jit(LanguageModel.init, static_argnums=0)


def ending(params: Params, mean: float) -> Params:
    """The parameters of a model that draws STOP with a probability near 1/mean whatever it has read.

    The first coordinate of every embedding is 10 and far above the others, so it is √d after the last norm, and a
    larger one of STOP alone adds a constant to its logit: log((V - 1) / (mean - 1)) where all others are about equal.
    """
    embedding = params["embed"]["embedding"]
    vocabulary, width = embedding.shape
    more = math.log((vocabulary - 1) / (mean - 1)) / math.sqrt(width)
    embedding = embedding.at[:, 0].set(10.0).at[STOP, 0].set(10.0 + more)
    return params | {"embed": params["embed"] | {"embedding": embedding}}


def policy_of(work: Work, mesh: jax.sharding.Mesh, model: LanguageModel) -> Params:
    """Fresh parameters; where responses are ragged, of a policy that ends them by chance."""
    params = fresh(mesh, model, work["seed"])
    return born(mesh, lambda params: ending(params, work["mean"]), params) if work["mean"] else params


def random_tokens(work: Work, step: int, *shape: int) -> np.ndarray:
    """Token ids of which none is special; others in every step."""
    draw = np.random.default_rng((work["seed"], step))
    return draw.integers(FIRST_TOKEN, work["shape"]["vocab_size"], shape, dtype=np.int32)


def optimizer_section(work: Work) -> Optimizer:
    """AdamW at a constant rate, as the peers have it."""
    return Optimizer(lr=work["lr"], schedule="constant", clip_norm=work["clip"], weight_decay=work["weight_decay"])


def prompts_of(work: Work, step: int) -> PromptBatch:
    """Random prompts without padding."""
    tokens = random_tokens(work, step, work["rows"], work["prompt"])
    uid = np.arange(work["rows"], dtype=np.int32) + step * work["rows"]
    return PromptBatch(*map(jnp.asarray, (tokens, np.ones_like(tokens, bool), uid)))


def sampling_of(work: Work) -> SamplingParams:
    stop = STOP if work["mean"] else NEVER
    return SamplingParams(max_new_tokens=work["response"], stop_id=stop, pad_id=PAD, slots=work["slots"] or None)


class OfflineLoop:
    """One step after the other of a stage that trains on batches, as `rlhfjax.stages.offline` builds it."""

    def __init__(self, c: Any, learner: OfflineLearner, batch: Callable[[int], Any]):
        self._mesh, self._batch = make_mesh(), batch
        optimizer = make_optimizer(c.optimizer, STEPS)
        self._state: TrainState = init_state(self._mesh, learner.params, optimizer)
        self._step = partial(build_offline(c, self._mesh, learner, self._state, optimizer), learner.fixed)

    def __call__(self, number: int) -> None:
        batch = place_batch(self._mesh, self._batch(number))
        self._state, metrics = self._step(self._state, batch, jax.random.key(number))
        jax.block_until_ready(self._state)
        jax.device_get(metrics)


def learner_of(model: LanguageModel, params: Params, objective: Any, **more: Any) -> OfflineLearner:
    """A learner that is never measured."""
    unmeasured: Any = None
    return OfflineLearner("policy", model, params, objective, unmeasured, unmeasured, (), **more)


def sft(work: Work) -> OfflineLoop:
    model = model_of(work)

    def batch(step: int) -> TokenBatch:
        tokens = random_tokens(work, step, work["rows"], work["length"])
        positions = np.broadcast_to(np.arange(work["length"], dtype=np.int32), tokens.shape)
        return TokenBatch(*map(jnp.asarray, (tokens, np.ones_like(tokens), positions, np.ones_like(tokens, bool))))

    section = schema.Sft(batch=schema.Batch(size=work["rows"], length=work["length"]), **trained_as(work))
    params = fresh(make_mesh(), model, work["seed"])
    return OfflineLoop(section, learner_of(model, params, training_loss(model)), batch)


def reward(work: Work) -> OfflineLoop:
    model, section = model_of(work), schema.Reward(batch=pairs_section(work), **trained_as(work))
    params = with_head(fresh(make_mesh(), model, work["seed"]), init_head(jax.random.key(1), model.config.width))
    pack = pairs_packer(work, model, ends=True)
    learner = learner_of(model, params, reward_modelling(model, section.loss), pack=pack)
    return OfflineLoop(section, learner, partial(pairs_of, work))


def dpo(work: Work) -> OfflineLoop:
    model, mesh, section = model_of(work), make_mesh(), schema.Dpo(batch=pairs_section(work), **trained_as(work))
    policy, reference = (fresh(mesh, model, work["seed"]) for _ in range(2))
    how = {"beside": {"reference": reference}, "pack": pairs_packer(work, model)}
    learner = learner_of(model, policy, preference_optimisation(model, section.loss), **how)
    return OfflineLoop(section, learner, partial(pairs_of, work))


def trained_as(work: Work) -> dict[str, Any]:
    """What the sections of all of them say."""
    return {"data": [schema.Data(source="random")], "steps": STEPS, "optimizer": optimizer_section(work)}


def pairs_section(work: Work) -> RankedSection:
    return RankedSection(size=work["rows"] // 2, length=work["length"], candidates=2)


def pairs_packer(work: Work, model: LanguageModel, ends: bool = False) -> Pack | None:
    """The packing that a stage chooses for these pairs."""
    width = 2 * work["length"] - work["prompt"] + 1
    return ranking_packer(pairs_section(work), make_mesh(), model, width, ends)


def pairs_of(work: Work, step: int) -> RankedBatch:
    """Half as many prompts as rows, each with a better and a worse response."""
    pairs = work["rows"] // 2
    tokens = random_tokens(work, step, pairs, 2, work["length"])
    tokens[:, :, : work["prompt"]] = tokens[:, :1, : work["prompt"]]
    ranks = np.tile(np.array([1, 2], np.int32), (pairs, 1))
    prompts = np.full(pairs, work["prompt"], np.int32)
    parts = (tokens, np.ones_like(tokens, bool), ranks, np.ones_like(ranks, bool), prompts)
    return RankedBatch(*map(jnp.asarray, parts))


class Texts:
    """Responses to the prompts of one step after the other, with at most `slots` rows decoding at a time.

    Where one row decodes, weights stay arranged between steps, as `rlhfjax.generation.Programs` keeps them for a loaded
    model; more rows decode as in a rollout, whose parameters are others every time.
    """

    def __init__(self, work: Work):
        model, mesh, self._work = model_of(work), make_mesh(), work
        params = policy_of(work, mesh, model)
        self._params = jax.jit(partial(model.arrange, rows=1))(params) if work["slots"] == 1 else params
        self._sample = jax.jit(partial(generate, model, sampling=sampling_of(work)))

    def __call__(self, number: int) -> list[int]:
        """The lengths of the responses; ragged ones are the same in every step, since peers compile for each length."""
        number = 0 if self._work["mean"] else number
        made = self._sample(self._params, prompts_of(self._work, number), jax.random.key(number))
        return lengths_of(made)


def lengths_of(made: Rollout) -> list[int]:
    return np.asarray(made.response_mask).sum(axis=1).tolist()


def judged_by(c: schema.Ppo, model: Any) -> Judges:
    """The scores of one reward model."""
    return Judges(tuple(c.rewards), {"model": model})


class PpoLoop:
    """One iteration after the other: the four steps of `rlhfjax.stages.online`, compiled ahead as the stage does.

    Policy, value, reference and reward model have the same shape; the value model starts from the reward model. With a
    shared trunk a head on the policy's own takes its place.
    """

    def __init__(self, work: Work):
        self._work, self._mesh = work, make_mesh()
        model, c = model_of(work), ppo_section(work)
        policy, judge = policy_of(work, self._mesh, model), fresh(self._mesh, model, work["seed"] + 1)
        reward = with_head(judge, init_head(jax.random.key(1), model.config.width))
        optimizer = optimizer_of(c, model.config.width)
        value = reward if c.value.trunk == "own" else {"head": reward["head"]}
        params, models = {"policy": policy, "value": value}, {"policy": model, "value": model}
        self._frozen = {"reference": policy, "rewards": {"model": reward}}
        learner = OnlineLearner(
            ppo_objective(c, model, model), models, params, judged_by(c, model), self._frozen, optimizer
        )
        self._state = first_state(c, self._mesh, learner)
        steps = build(c, self._mesh, learner, self._state, sampling_of(work))
        ahead, prompts = Ahead("ppo"), place_batch(self._mesh, prompts_of(work, 0))
        self._steps, self._first = ahead.online(steps, self._state, self._frozen, prompts, None), ahead.first_step

    def __call__(self, number: int) -> dict[str, Any]:
        prompts = place_batch(self._mesh, prompts_of(self._work, number))
        rollout_key, update_key = jax.random.split(jax.random.key(number))
        clock, steps = _Clock(), self._steps
        made = clock("generation", steps.rollout(self._state.train.params, prompts, rollout_key))
        scored = clock("scoring", steps.score(self._state.train.params, self._frozen, made))
        experience, metrics = clock("estimate", steps.estimate(scored, self._state.kl_coef))
        self._state, measured = clock("update", steps.update(self._state, experience, None, metrics, update_key))
        jax.device_get(metrics | measured)
        if number == 0:
            self._first()
        lengths = lengths_of(made)
        return {"tokens": sum(lengths), "lengths": lengths, "phases": clock.seconds}


@dataclass(frozen=True)
class Counted:
    """In the place of a reward model, the function that GRPO's peers call: it costs nothing. Here: the token's id."""

    def batch_hidden(self, params: Params, batch: TokenBatch, dropout=0.0, key=None, read=None) -> jax.Array:
        tokens = batch.tokens if read is None else jnp.take_along_axis(batch.tokens, read, axis=1)
        return tokens.astype(jnp.float32)

    def scalar(self, params: Params, hidden: jax.Array) -> jax.Array:
        return hidden

    def shares_prompts(self, width: int) -> bool:
        return True


class GrpoLoop:
    """One step after the other: `per_prompt` responses to each prompt, compared with each other, one update.

    Old log-probabilities are the sampler's, since nothing is learned between sampling and the one update.
    """

    def __init__(self, work: Work):
        self._work, self._mesh = work, make_mesh()
        model, c = model_of(work), ppo_section(work, "rollout")

        def log_probs(params: Params, rows: Any) -> tuple[jax.Array, jax.Array]:
            return token_log_probs(model, params["policy"], rows)

        algorithm: Any = Grpo(log_probs, work["per_prompt"], missing_eos="keep")
        optimizer = optax.partition({"policy": make_optimizer(optimizer_section(work), STEPS)}, {"policy": "policy"})
        policy, reference = (fresh(self._mesh, model, work["seed"]) for _ in range(2))
        self._frozen = {"reference": reference, "rewards": {"model": {"decoder": {}}}}
        judge: Any = Counted()
        learner = OnlineLearner(
            algorithm, {"policy": model}, {"policy": policy}, judged_by(c, judge), self._frozen, optimizer
        )
        self._state = first_state(c, self._mesh, learner)
        self._steps = build(c, self._mesh, learner, self._state, sampling_of(work))

    def __call__(self, number: int) -> dict[str, Any]:
        asked = self._work | {"rows": self._work["rows"] // self._work["per_prompt"]}
        prompts = place_batch(self._mesh, prompts_of(asked, number))
        sample_key, update_key = jax.random.split(jax.random.key(number))
        clock, steps, params = _Clock(), self._steps, self._state.train.params
        made = clock("generation", steps.rollout(params, prompts, sample_key))
        scored = clock("scoring", steps.score(params, self._frozen, made))
        experience, metrics = clock("estimate", steps.estimate(scored, self._state.kl_coef))
        self._state, measured = clock("update", steps.update(self._state, experience, None, metrics, update_key))
        jax.device_get(metrics | measured)
        return {"tokens": sum(lengths_of(made)), "phases": clock.seconds}


class _Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, phase: str, result: Any) -> Any:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now
        return result


def ppo_section(work: Work, old_log_probs: Literal["recompute", "rollout"] = "recompute") -> schema.Ppo:
    """The `ppo` section of a configuration that does what the workload says."""
    rows = work["rows"]
    return schema.Ppo(
        **trained_as(work),
        batch=RolloutBatch(
            size=rows,
            minibatch=rows // work["minibatches"],
            epochs=work["epochs"],
            prompt_length=work["prompt"],
        ),
        sampling=Sampling(max_new_tokens=work["response"], old_log_probs=old_log_probs),
        value=schema.Value(trunk="policy" if work["task"] == "ppo_shared_trunk" else "own"),
    )
