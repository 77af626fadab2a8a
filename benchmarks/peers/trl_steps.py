"""TRL's trainers for SFT, DPO, GRPO and the reward model.

    python trl_steps.py WORKLOAD_AS_JSON

Its defaults of bfloat16 and gradient checkpointing are off, which makes it faster here.
"""

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback
from transformers_models import policy_of, rows_of, scorer_of, text_of, tokenizer_of
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from worker import Worker

STEPS = 64  # rows are repeated after so many steps


class Laps(TrainerCallback):
    def __init__(self, worker: Worker, tokens: int):
        self._worker, self._tokens, self.phases = worker, tokens, {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._worker.lap(tokens=self._tokens, phases=dict(self.phases))
        self.phases.clear()


def settings(work: dict[str, Any], **own: Any) -> dict[str, Any]:
    """What all trainers are told."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl_"),
        "max_steps": 100_000,
        "learning_rate": work["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": work["weight_decay"],
        "max_grad_norm": work["clip"],
        "bf16": work["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": work["seed"],
    } | own


def sft(worker: Worker) -> None:
    work = worker.work
    data = Dataset.from_dict({"input_ids": rows_of(work, STEPS * work["rows"], work["length"])})
    config = SFTConfig(**settings(work, per_device_train_batch_size=work["rows"], max_length=work["length"]))
    laps = Laps(worker, work["rows"] * work["length"])
    tokenizer = tokenizer_of(work)
    SFTTrainer(policy_of(work), config, train_dataset=data, processing_class=tokenizer, callbacks=[laps]).train()


def reward(worker: Worker) -> None:
    work, pairs = worker.work, worker.work["rows"] // 2
    rows = rows_of(work, 2 * STEPS * pairs, work["length"])
    data = Dataset.from_dict({"chosen_ids": rows[::2], "rejected_ids": rows[1::2]})
    config = RewardConfig(**settings(work, per_device_train_batch_size=pairs, max_length=work["length"]))
    laps = Laps(worker, work["rows"] * work["length"])
    tokenizer = tokenizer_of(work)
    RewardTrainer(scorer_of(work), config, train_dataset=data, processing_class=tokenizer, callbacks=[laps]).train()


def on_disk(work: dict[str, Any]) -> LlamaForCausalLM:
    """A policy that was read from a folder: some trainers make its reference by reading it again."""
    folder = tempfile.mkdtemp(prefix="trl_")
    policy_of(work).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def dpo(worker: Worker) -> None:
    work, pairs = worker.work, worker.work["rows"] // 2
    answer = work["length"] - work["prompt"] - 1  # the trainer adds EOS
    prompts = [text_of(row) for row in rows_of(work, STEPS * pairs, work["prompt"])]
    answers = [" " + text_of(row) for row in rows_of(work, 2 * STEPS * pairs, answer)]
    data = Dataset.from_dict({"prompt": prompts, "chosen": answers[::2], "rejected": answers[1::2]})
    config = DPOConfig(**settings(work, per_device_train_batch_size=pairs, max_length=work["length"]))
    laps = Laps(worker, work["rows"] * work["length"])
    model, tokenizer = on_disk(work), tokenizer_of(work)
    DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[laps]).train()


def grpo(worker: Worker) -> None:
    work = worker.work
    prompts = [text_of(row) for row in rows_of(work, STEPS * work["rows"] // work["per_prompt"], work["prompt"])]
    config = GRPOConfig(
        **settings(
            work,
            per_device_train_batch_size=work["rows"],
            num_generations=work["per_prompt"],
            max_completion_length=work["response"],
            temperature=1.0,
            beta=0.04,
        )
    )
    laps = Laps(worker, work["rows"] * work["response"])

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [len(set(text)) / 10 for text in completions]

    model = on_disk(work)
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        made = generate(*args, **kwargs)
        laps.phases["generation"] = time.perf_counter() - began
        return made

    model.generate = timed
    data = Dataset.from_dict({"prompt": prompts})
    tokenizer = tokenizer_of(work)
    GRPOTrainer(model, rewards, config, train_dataset=data, processing_class=tokenizer, callbacks=[laps]).train()


TASKS = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo}

if __name__ == "__main__":
    a_worker = Worker()
    torch.manual_seed(a_worker.work["seed"])
    TASKS[a_worker.work["task"]](a_worker)
