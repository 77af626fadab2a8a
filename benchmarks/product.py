"""The compiled steps of the stages without their run directories: models, data and settings come from a workload."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.worker import response_lengths
from rlhfjax.algorithms import restrict
from rlhfjax.config import schema
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.heads import init_head, with_head
from rlhfjax.models.lora import join
from rlhfjax.sharding import make_mesh, place_batch, state_shardings
from rlhfjax.stages.offline import reward_modelling, training_loss
from rlhfjax.stages.ppo import compiled_steps, ppo_algorithm, ppo_optimizer
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import init_state, place
from rlhfjax.training.update import offline_step
from rlhfjax.types import OnlineState, Params, PromptBatch, RankedBatch, TokenBatch, TrainState

STOP, PAD = 2, 0
FIRST_TOKEN = 3


def model_of(work: dict[str, Any], kind: type[LanguageModel] = LanguageModel) -> LanguageModel:
    """A Llama of the workload's shape."""
    return kind(decoder_config("llama", **work["shape"], dtype=work["dtype"]))


def fresh(mesh: jax.sharding.Mesh, model: LanguageModel, seed: int) -> Params:
    """Random parameters on the mesh."""
    return place(mesh, jax.jit(model.init)(jax.random.key(seed)))


def random_tokens(work: dict[str, Any], step: int, *shape: int) -> np.ndarray:
    """Token ids of which none is special; others in every step."""
    draw = np.random.default_rng((work["seed"], step))
    return draw.integers(FIRST_TOKEN, work["shape"]["vocab_size"], shape, dtype=np.int32)


def optimizer_section(work: dict[str, Any]) -> schema.Optimizer:
    """AdamW at a constant rate, as the peers have it."""
    return schema.Optimizer(
        lr=work["lr"], schedule="constant", clip_norm=work["clip"], weight_decay=work["weight_decay"]
    )


@dataclass(frozen=True)
class EndingModel(LanguageModel):
    """A decoder whose responses end where the last token of their prompt says: all systems must do the same work.

    Its cache carries the length that is left for each row.
    """

    def prefill(self, params: Params, prompt: jax.Array, prompt_mask: jax.Array, new_tokens: int):
        logits, cache = super().prefill(params, prompt, prompt_mask, new_tokens)
        left = prompt[:, -1]
        return _ended(logits, left), (cache, left - 1)

    def decode(self, params: Params, cache: Any, tokens: jax.Array):
        inner, left = cache
        logits, inner = super().decode(params, inner, tokens)
        return _ended(logits, left), (inner, left - 1)


def _ended(logits: jax.Array, left: jax.Array) -> jax.Array:
    return logits.at[:, STOP].set(jnp.where(left <= 1, 1e9, -1e9))


def prompts_of(work: dict[str, Any], step: int) -> PromptBatch:
    """Random prompts without padding; the last token of each says how long its response is."""
    tokens = random_tokens(work, step, work["rows"], work["prompt"])
    tokens[:, -1] = response_lengths(work, step)
    uid = np.arange(work["rows"], dtype=np.int32) + step * work["rows"]
    return PromptBatch(tokens, np.ones_like(tokens, bool), uid)


def sampling_of(work: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_new_tokens=work["response"], stop_id=STOP, pad_id=PAD)


class OfflineLoop:
    """One step after the other of a stage that trains on batches, as `rlhfjax.stages.offline` compiles it."""

    def __init__(self, work: dict[str, Any], algorithm: Any, params: Params, batch: Callable[[int], Any], frozen: Any):
        mesh = make_mesh()
        self._mesh, self._batch, self._frozen = mesh, batch, frozen
        optimizer = make_optimizer(optimizer_section(work), 10_000)
        self._state: TrainState = init_state(mesh, params, optimizer)

        @partial(jax.jit, donate_argnums=1, out_shardings=(state_shardings(mesh, self._state), None))
        def step(frozen: Any, state: TrainState, batch: Any, key: jax.Array):
            return offline_step(restrict(algorithm, partial(join, frozen)), optimizer, state, batch, key)

        self._step = step

    def __call__(self, number: int) -> None:
        batch = place_batch(self._mesh, self._batch(number))
        self._state, metrics = self._step(self._frozen, self._state, batch, jax.random.key(number))
        jax.block_until_ready(self._state)
        jax.device_get(metrics)

    @classmethod
    def sft(cls, work: dict[str, Any]) -> "OfflineLoop":
        model = model_of(work)

        def batch(step: int) -> TokenBatch:
            tokens = random_tokens(work, step, work["rows"], work["length"])
            positions = np.broadcast_to(np.arange(work["length"], dtype=np.int32), tokens.shape)
            return TokenBatch(tokens, np.ones_like(tokens), positions.copy(), np.ones_like(tokens, bool))

        return cls(work, training_loss(model), fresh(make_mesh(), model, work["seed"]), batch, {})

    @classmethod
    def reward(cls, work: dict[str, Any]) -> "OfflineLoop":
        model = model_of(work)
        params = with_head(fresh(make_mesh(), model, work["seed"]), init_head(jax.random.key(1), model.config.width))
        return cls(work, reward_modelling(model, schema.RankingLoss()), params, partial(_pairs, work), {})

    @classmethod
    def dpo(cls, work: dict[str, Any]) -> "OfflineLoop":
        raise NotImplementedError("this version has no DPO")


def _pairs(work: dict[str, Any], step: int) -> RankedBatch:
    """Half as many prompts as rows, each with a better and a worse response."""
    pairs = work["rows"] // 2
    tokens = random_tokens(work, step, pairs, 2, work["length"])
    tokens[:, :, : work["prompt"]] = tokens[:, :1, : work["prompt"]]
    ranks = np.broadcast_to(np.array([1, 2], np.int32), (pairs, 2)).copy()
    prompts = np.full(pairs, work["prompt"], np.int32)
    return RankedBatch(tokens, np.ones_like(tokens, bool), ranks, np.ones((pairs, 2), bool), prompts)


class Texts:
    """Responses to one batch of prompts after the other."""

    def __init__(self, work: dict[str, Any]):
        model, self._work = model_of(work, EndingModel), work
        self._params = fresh(make_mesh(), model, work["seed"])
        sampling, slots = sampling_of(work), work["slots"]
        self._batches = max(1, work["rows"] // slots) if slots else 1
        self._generate = jax.jit(partial(generate, model, sampling=sampling))

    def __call__(self, number: int) -> int:
        prompts, made = prompts_of(self._work, number), 0
        for part in range(self._batches):
            some = jax.tree.map(lambda x, part=part: np.split(x, self._batches)[part], prompts)
            rollout = self._generate(self._params, some, jax.random.key(number))
            made += int(np.asarray(rollout.response_mask).sum())
        return made


class PpoLoop:
    """One iteration after the other: the four compiled steps of `rlhfjax.stages.ppo`."""

    def __init__(self, work: dict[str, Any]):
        self._work, mesh = work, make_mesh()
        model = model_of(work, EndingModel)
        c = ppo_section(work)
        policy, reward_decoder = fresh(mesh, model, work["seed"]), fresh(mesh, model, work["seed"] + 1)
        head = init_head(jax.random.key(1), model.config.width)
        reward = with_head(reward_decoder, head)
        algorithm, optimizer = ppo_algorithm(c, model, model), ppo_optimizer(c, model.config.width)
        train = init_state(mesh, {"policy": policy, "value": reward}, optimizer)
        state = OnlineState(train, jnp.float32(c.kl.coef), jnp.int32(0))
        self._state = jax.device_put(state, state_shardings(mesh, state))
        job: Any = SimpleNamespace(config=c, mesh=mesh)
        self._steps = compiled_steps(job, self._state, algorithm, optimizer, model, model, sampling_of(work))
        self._frozen, self._mesh = {"reference": policy, "reward": reward}, mesh

    def __call__(self, number: int) -> dict[str, Any]:
        prompts = place_batch(self._mesh, prompts_of(self._work, number))
        rollout_key, update_key = jax.random.split(jax.random.key(number))
        clock, steps = _Clock(), self._steps
        rollout = clock("generation", steps.rollout(self._state.train.params, prompts, rollout_key))
        rollout = clock("scoring", steps.score(self._state.train.params, self._frozen, rollout))
        experience, metrics = clock("estimate", steps.estimate(rollout, self._state.kl_coef))
        self._state, measured = clock("update", steps.update(self._state, experience, None, metrics, update_key))
        found = jax.device_get(metrics | measured)
        return {"tokens": int(found["tokens"]), "phases": clock.seconds}


class GrpoLoop:
    def __init__(self, work: dict[str, Any]):
        raise NotImplementedError("this version has no GRPO")

    def __call__(self, number: int) -> dict[str, Any]:
        raise NotImplementedError


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


def ppo_section(work: dict[str, Any]) -> schema.Ppo:
    """The `ppo` section of a configuration that does what the workload says."""
    rows = work["rows"]
    return schema.Ppo.model_validate(
        {
            "data": [{"source": "random"}],
            "steps": 10_000,
            "batch": {
                "size": rows,
                "minibatch": rows // work["minibatches"],
                "epochs": work["epochs"],
                "prompt_length": work["prompt"],
            },
            "sampling": {"max_new_tokens": work["response"]},
            "optimizer": optimizer_section(work).model_dump(),
        }
    )
