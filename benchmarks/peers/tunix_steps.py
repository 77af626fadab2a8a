"""google-tunix: SFT, DPO, PPO, GRPO and its sampler.

    python tunix_steps.py WORKLOAD_AS_JSON

Version 0.1.7 needs three workarounds for its own Llama: its PPO passes `segment_ids`, which that model does not take;
its critic cannot be made from a model with tied embeddings; and its sampler takes prompts as text alone.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from worker import Worker

PAD, BOS, EOS, NEVER = 0, 1, 2, -1  # no token is NEVER: responses end at their full length
STEPS = 1_000_000


class Words:
    """A tokenizer whose words are the numbers of their tokens."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD


class Llama(Llama3):
    """tunix's Llama, which ignores `segment_ids`."""

    def __call__(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
        return super().__call__(input_tokens, positions, cache, attention_mask)


def policy_of(work: dict[str, Any], seed: int = 0) -> Llama:
    shape = work["shape"]
    config = ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["width"],
        hidden_dim=shape["mlp_width"],
        num_heads=shape["heads"],
        head_dim=shape["width"] // shape["heads"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    return Llama(config, rngs=nnx.Rngs(seed))


def scorer_of(work: dict[str, Any], seed: int) -> Llama:
    model = policy_of(work, seed)
    model.config = dataclasses.replace(model.config, weight_tying=False)
    model.lm_head = nnx.Linear(work["shape"]["width"], 1, use_bias=False, rngs=nnx.Rngs(seed))
    return model


def optimizer_of(work: dict[str, Any], clip: bool = True) -> optax.GradientTransformation:
    adamw = optax.adamw(work["lr"], weight_decay=work["weight_decay"])
    return optax.chain(optax.clip_by_global_norm(work["clip"]), adamw) if clip else adamw


def tokens_of(work: dict[str, Any], step: int, *shape: int) -> np.ndarray:
    draw = np.random.default_rng((work["seed"], step))
    return draw.integers(3, work["shape"]["vocab_size"], shape, dtype=np.int32)


def prompts_of(work: dict[str, Any], step: int, count: int) -> np.ndarray:
    # The sampler puts BOS before each.
    return np.array([" ".join(map(str, row)) for row in tokens_of(work, step, count, work["prompt"] - 1)])


def laps(worker: Worker, batches: Iterator[Any], models: list[nnx.Module], phases: dict[str, float]) -> Iterator[Any]:
    """The batches; when the loop comes for the next one, the step before is waited for and timed."""
    for step, batch in enumerate(batches):
        if step:
            jax.block_until_ready([nnx.state(model) for model in models])
            work = worker.work
            tokens = sum(worker.lengths()) if work["response"] else work["rows"] * work["length"]
            worker.lap(tokens=tokens, phases=dict(phases))
        yield batch


def sft(worker: Worker) -> None:
    work, model = worker.work, policy_of(worker.work)
    rows, length = work["rows"], work["length"]
    causal = np.broadcast_to(np.tril(np.ones((length, length), bool)), (rows, length, length))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))

    def inputs(tokens: Any) -> dict[str, Any]:
        mask = jnp.ones((rows, length), bool)
        return {"input_tokens": tokens, "input_mask": mask, "positions": positions, "attention_mask": causal}

    trainer = PeftTrainer(model, optimizer_of(work), TrainingConfig(eval_every_n_steps=STEPS, max_steps=STEPS))
    trainer = trainer.with_gen_model_input_fn(inputs)
    batches = (tokens_of(work, step, rows, length) for step in itertools.count())
    trainer.train(laps(worker, batches, [model], {}))


def dpo(worker: Worker) -> None:
    work, model = worker.work, policy_of(worker.work)
    pairs, prompt, answer = work["rows"] // 2, work["prompt"], work["length"] - work["prompt"]

    def batch(step: int) -> TrainingInput:
        tokens = tokens_of(work, step, pairs, prompt + 2 * answer)
        mask = np.ones((pairs, answer), bool)
        chosen, rejected = tokens[:, prompt : prompt + answer], tokens[:, prompt + answer :]
        ones = np.ones((pairs, prompt), bool)
        return TrainingInput(tokens[:, :prompt], ones, chosen, mask, rejected, mask)

    config = DPOTrainingConfig(eval_every_n_steps=STEPS, max_steps=STEPS, beta=0.1)
    trainer = DPOTrainer(model, policy_of(work, 1), optimizer_of(work, clip=False), config)
    trainer.train(laps(worker, map(batch, itertools.count()), [model], {}))


def cluster_of(worker: Worker, phases: dict[str, float], **models: Llama) -> rl_cluster.RLCluster:
    work, roles = worker.work, rl_cluster.Role
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    rollout = RolloutConfig(
        max_tokens_to_generate=work["response"],
        max_prompt_length=work["prompt"],
        kv_cache_size=work["prompt"] + work["response"] + 1,
        temperature=1.0,
        eos_tokens=[NEVER],
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer_of(work, clip=False),
        critic_optimizer=optimizer_of(work, clip=False) if "critic" in models else None,
        eval_every_n_steps=STEPS,
        max_steps=STEPS,
    )
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
    )
    cluster = rl_cluster.RLCluster(tokenizer=Words(), cluster_config=config, **models)
    generate = cluster.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        made = generate(*args, **kwargs)
        phases["generation"] = time.perf_counter() - began
        return made

    cluster.generate = timed
    return cluster


def ppo(worker: Worker) -> None:
    work, phases = worker.work, {}
    models = {"actor": policy_of(work), "reference": policy_of(work, 1)}
    models |= {"critic": scorer_of(work, 2), "reward": scorer_of(work, 3)}
    cluster = cluster_of(worker, phases, **models)
    learner = PPOLearner(cluster, PPOConfig(num_iterations=work["epochs"]))
    batches = ({"prompts": prompts_of(work, step, work["rows"])} for step in itertools.count())
    trained = [cluster.actor_trainer.model, cluster.critic_trainer.model]
    learner.train(laps(worker, batches, trained, phases))


def grpo(worker: Worker) -> None:
    work, phases = worker.work, {}
    cluster = cluster_of(worker, phases, actor=policy_of(work), reference=policy_of(work, 1))

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    learner = GRPOLearner(cluster, GRPOConfig(num_generations=work["per_prompt"], beta=0.04), rewards)
    count = work["rows"] // work["per_prompt"]
    batches = ({"prompts": prompts_of(work, step, count)} for step in itertools.count())
    learner.train(laps(worker, batches, [cluster.actor_trainer.model], phases))


def generation(worker: Worker) -> None:
    """Batches of `slots` prompts, each to its longest response: the sampler cannot refill a finished row."""
    work, shape = worker.work, worker.work["shape"]
    size = work["prompt"] + work["response"] + 1
    cache = CacheConfig(size, shape["layers"], shape["kv_heads"], shape["width"] // shape["heads"])
    sampler = Sampler(policy_of(work), Words(), cache)
    for step in itertools.count():
        lengths = worker.lengths()
        prompts = prompts_of(work, step, work["rows"]).tolist()
        for first in range(0, work["rows"], work["slots"]):
            some = slice(first, first + work["slots"])
            sampler(
                prompts[some],
                max_generation_steps=max(lengths[some]),
                max_prompt_length=work["prompt"],
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[NEVER],
                seed=step,
            )
        worker.lap(tokens=sum(lengths))


TASKS = {"sft": sft, "dpo": dpo, "ppo": ppo, "grpo": grpo}

if __name__ == "__main__":
    a_worker = Worker()
    with Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp")):
        TASKS.get(a_worker.work["task"], generation)(a_worker)
