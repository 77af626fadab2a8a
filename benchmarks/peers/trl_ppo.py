"""TRL's PPOTrainer; version 1.12.0 is the last that has one.

    python trl_ppo.py WORKLOAD_AS_JSON

Four models of the same size: policy, value, frozen reference, reward. It always samples to the longest response of a
batch; where the workload says how long each response is, the rows are cut there before anything is scored.
"""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers_models import EOS, PAD, policy_of, rows_of, scorer_of, tokenizer_of
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from worker import Worker


class Laps(TrainerCallback):
    def __init__(self, worker: Worker):
        self._worker, self.phases = worker, {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._worker.lap(tokens=sum(self._worker.lengths()), phases=dict(self.phases))


def sampled_to_lengths(worker: Worker, laps: Laps) -> None:
    """Makes the trainer sample to the longest response of a batch, end each row where it should, and time it."""
    sample = ppo_trainer.batch_generation

    def batch_generation(model: Any, queries: Any, size: int, pad: int, config: Any) -> Any:
        began, lengths = time.perf_counter(), worker.lengths()
        config.max_new_tokens = max(lengths)
        model.generation_config.eos_token_id = None
        texts, logits = sample(model, queries, size, pad, config)
        if worker.work["lengths"]:
            answers = texts[:, queries.shape[1] :]
            answers[(answers == EOS) | (answers == PAD)] = 3
            for row, length in enumerate(lengths):
                answers[row, length - 1] = EOS
        laps.phases["generation"] = time.perf_counter() - began
        return texts, logits

    ppo_trainer.batch_generation = batch_generation


def main() -> None:
    worker = Worker()
    work = worker.work
    torch.manual_seed(work["seed"])
    laps = Laps(worker)
    sampled_to_lengths(worker, laps)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl_"),
        per_device_train_batch_size=work["rows"],
        gradient_accumulation_steps=1,
        num_mini_batches=work["minibatches"],
        num_ppo_epochs=work["epochs"],
        total_episodes=work["rows"] * 1000,
        response_length=work["response"],
        stop_token_id=EOS if work["lengths"] else None,
        temperature=1.0,
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        weight_decay=work["weight_decay"],
        local_rollout_forward_batch_size=work["rows"],
        num_sample_generations=0,
        bf16=work["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=work["seed"],
    )
    PPOTrainer(
        args=config,
        processing_class=tokenizer_of(work),
        model=policy_of(work),
        ref_model=policy_of(work),
        reward_model=scorer_of(work),
        value_model=scorer_of(work),
        train_dataset=Dataset.from_dict({"input_ids": rows_of(work, work["rows"] * 64, work["prompt"])}),
        callbacks=[laps],
    ).train()


if __name__ == "__main__":
    main()
