"""Bytes on the device while PPO samples, with all weights trained and with adapters alone.

    JAX_PLATFORMS=cpu python benchmarks/lora_memory.py [key=value…]

Counts every array that is alive, arrays of one buffer once: policy, reference, value and reward model, optimizer
moments. A model of ten million parameters on synthetic text; overrides are those of `rlhfjax run`.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import jax

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from rlhfjax.stages import online

LORA = {"rank": 8, "alpha": 16.0, "targets": ["attention", "mlp"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, dense = measured(Path(folder) / "dense", None)
        _, adapted = measured(Path(folder) / "adapted", LORA)
    print(f"{base:,} parameters, {4 * base / 1e6:.1f} MB as float32")
    for name, size in (("all weights", dense), (f"adapters of rank {LORA['rank']}", adapted)):
        print(f"{name:>20}: {size / 1e6:8.1f} MB = {size / (4 * base):.2f} x the policy")


def measured(folder: Path, lora: dict | None) -> tuple[int, int]:
    """Parameters of the policy, and bytes alive when the second PPO iteration begins."""
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(json.dumps(recipe(folder, lora)), encoding="utf-8")
    live, loop = [], online.train_online

    def watched(steps, state, *args, **kwargs):
        def rollout(*inputs):
            buffers = {array.addressable_data(0).unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays()}
            live.append(sum(buffers.values()))
            return steps.rollout(*inputs)

        return loop(type(steps)(**vars(steps) | {"rollout": rollout}), state, *args, **kwargs)

    online.train_online = watched
    run_recipe(load_config(str(path), sys.argv[1:]), folder / "run")
    online.train_online = loop
    facts = json.loads((folder / "run" / "pretrain" / "complete.json").read_text(encoding="utf-8"))
    return facts["parameters"], live[1]


def recipe(folder: Path, lora: dict | None) -> dict:
    """One step of everything, two of PPO."""
    draw = random.Random(0)
    words = ["the", "film", "story", "ending", "music", "was", "is", "good", "bad", "dull", "warm", "long", "very"]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    def data(name: str, record) -> list[dict]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record()) + "\n" for _ in range(64)), encoding="utf-8")
        return [{"source": str(path)}]

    documents = data("documents", lambda: {"text": text(30)})
    demonstrations = data("demonstrations", lambda: {"prompt": text(3), "completion": " " + text(3)})
    comparisons = data(
        "comparisons", lambda: {"prompt": text(3), "responses": [" " + text(2), " " + text(3)], "ranks": [1, 2]}
    )
    prompts = data("prompts", lambda: {"prompt": text(3)})
    short = {"steps": 1, "optimizer": {"lr": 1e-4}}
    return {
        "name": "lora_memory",
        "data_dir": str(folder / "prepared"),
        "model": {"layers": 6, "width": 384, "heads": 6, "context": 64, "lora": lora},
        "tokenizer": {"vocab_size": 320, "data": documents},
        "stages": {
            "pretrain": {"data": documents, "batch": {"size": 8, "length": 64}} | short,
            "sft": {"data": demonstrations, "batch": {"size": 8, "length": 48}} | short,
            "reward": {
                "data": comparisons,
                "batch": {"size": 8, "length": 48, "candidates": 2},
                "normalize": {"on": "none"},
            }
            | short,
            "ppo": {
                "data": prompts,
                "batch": {"size": 8, "epochs": 1, "prompt_length": 24},
                "sampling": {"max_new_tokens": 8},
            }
            | short
            | {"steps": 2},
        },
    }


if __name__ == "__main__":
    main()
