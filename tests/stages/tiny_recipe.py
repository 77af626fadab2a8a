"""A whole recipe in miniature: sixteen wide, a few steps per stage, on a few words of synthetic text."""

import json
import random
from pathlib import Path

STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
STEPS = 4
_GOOD = ["good", "fine", "warm", "bright", "calm"]
_BAD = ["bad", "grim", "cold", "dull", "loud"]
_WORDS = ["the", "film", "story", "ending", "music", "was", "is", "and", "a", "very", *_GOOD, *_BAD]


def write_files(folder: Path) -> Path:
    """documents, demonstrations, comparisons (K 2 to 4, with ties) and prompts, one JSONL file each."""
    draw = random.Random(7)

    def words(low: int, high: int, among=_WORDS) -> str:
        return " ".join(draw.choices(among, k=draw.randint(low, high)))

    def chat(i: int) -> dict:
        turns = [("user", words(1, 3)), ("assistant", words(1, 3))] * (1 + i % 2)
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    def comparison(i: int) -> dict:
        good = [draw.randint(0, 2) for _ in range(2 + i % 3)]
        good[:2] = [0, 2]  # at least one pair is not a tie
        responses = [" " + words(1, 2, _GOOD if value else _BAD) for value in good]
        ranking = {"responses": responses, "ranks": [3 - value for value in good]}
        if i % 4:
            return {"prompt": words(1, 3)} | ranking
        return {"messages": [{"role": "user", "content": words(1, 3)}]} | ranking

    write_jsonl(folder / "documents.jsonl", ({"text": words(2, 40)} for _ in range(60)))
    write_jsonl(
        folder / "demonstrations.jsonl",
        (chat(i) if i % 2 else {"prompt": words(1, 4), "completion": " " + words(1, 3)} for i in range(40)),
    )
    write_jsonl(folder / "comparisons.jsonl", (comparison(i) for i in range(40)))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": words(1, 4)} for _ in range(30)))
    return folder


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def recipe(files: Path) -> dict:
    """The configuration as plain data; batch sizes fit one device, eight, and 2 x 2 x 2."""

    def data(name: str) -> list[dict]:
        return [{"source": str(files / f"{name}.jsonl")}]

    optimizer = {"lr": 3e-3, "warmup_steps": 1}
    rollouts = {"prompt_length": 10, "overlong": "drop"}
    offline = {"steps": STEPS, "optimizer": optimizer, "validate_every": 2}
    return {
        "name": "tiny",
        "seed": 3,
        "data_dir": str(files / "prepared"),
        "model": {"layers": 2, "width": 16, "heads": 2, "mlp_width": 32, "context": 32},
        "tokenizer": {"vocab_size": 320, "data": data("documents")},
        "stages": {
            "pretrain": {
                "data": data("documents"),
                "validation": data("documents"),
                "batch": {"size": 8, "length": 32},
            } | offline | {"optimizer": optimizer | {"ema_decay": 0.9}},
            "sft": {
                "data": data("demonstrations"),
                "batch": {"size": 16, "micro": 8, "length": 24, "overlong": "drop"},
                "validation": data("demonstrations"),
                "select_by": "validation_loss",
                "dropout": 0.1,
            } | offline,
            "reward": {
                "data": data("comparisons"),
                "validation": data("comparisons"),
                "batch": {"size": 8, "length": 24, "candidates": 4, "overlong": "drop"},
                "normalize": {"data": data("demonstrations")},
            } | offline | {"optimizer": optimizer | {"ema_decay": 0.5}},  # what later stages read is the average
            "ppo": {
                "data": data("prompts"),
                "steps": STEPS,
                "batch": {"size": 16, "minibatch": 8, "epochs": 2} | rollouts,
                "sampling": {"max_new_tokens": 8, "temperature": 0.7},
                "kl": {"controller": "adaptive", "target": 0.01, "horizon": 100.0},
                "optimizer": optimizer | {"ema_decay": 0.9},
                "ptx": {"coef": 0.5, "length": 16, "data": data("documents")},
            },
            "evaluate": {
                "data": data("prompts"),
                "samples": 20,
                "batch": {"size": 16} | rollouts,
                "sampling": {"max_new_tokens": 8},
                "losses": data("documents"),
                "comparisons": data("comparisons"),
            },
        },
        "checkpoints": {"every": 1},
        "logging": {"samples_every": 1, "samples": 4},
    }  # fmt: skip


def write_recipe(path: Path, files: Path) -> Path:
    path.write_text(json.dumps(recipe(files), indent=1), encoding="utf-8")  # JSON is YAML
    return path
