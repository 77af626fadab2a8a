"""A run directory as a finished run leaves it, with figures of a plausible size, small enough to write in a test."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhfjax.evaluation.results import AccuracyRow, Evaluation, PolicyRow, Response, Sample, WinRow
from rlhfjax.evaluation.statistics import Interval

CONFIG = "name: movies-rlhf\nseed: 0\nstages:\n  pretrain: {steps: 700}\n  ppo: {iterations: 45}\n"


HOSTILE = "[red]fine[/red] \x1b[31mred\x1b[0m \u202eback <b>bold</b>"


def example_evaluation() -> Evaluation:
    def row(name: str, *estimates: float) -> AccuracyRow:
        keys = ("within_heldout", "within_mean", "within_clear", "across_clear")
        return AccuracyRow(name, {k: Interval(e, e - 0.018, e + 0.017) for k, e in zip(keys, estimates, strict=True)})

    return Evaluation(
        seed=0,
        date="2026-11-03 14:02",
        hardware="cpu, 2 devices",
        stage_seconds={"tokenizer": 1.2, "pretrain": 50.4, "sft": 40.1, "reward": 65.0, "ppo": 190.7, "evaluate": 21.3},
        heldout_losses={
            "pretrain": {"chat": 5.08, "snippets": 5.09},
            "sft": {"chat": 5.31, "snippets": 4.96},
            "ppo": {"chat": 5.35, "snippets": 5.07},
        },
        reward_accuracy=[
            row("human labelers", 0.799, 0.833, 0.908, 0.935),
            row("reward model", 0.604, 0.619, 0.66, 0.722),
            row("TF-IDF + ridge", 0.644, 0.658, 0.711, 0.796),
            row("VADER", 0.610, 0.615, 0.655, 0.666),
        ],
        judge_accuracy=[row("ridge judge", 0.632, 0.642, 0.694, 0.782), row("VADER", 0.610, 0.615, 0.655, 0.666)],
        win_rates=[
            WinRow("ridge judge", "ppo", "sft", Interval(0.77, 0.71, 0.81), 0.60, -0.02),
            WinRow("VADER", "ppo", "sft", Interval(0.71, 0.66, 0.77), 0.41, 0.14),
        ],
        policies=[
            PolicyRow("sft", 256, 14.7, 0.61, 0.935, 0.71, 0.01, 0.0, 4.96, -0.02),
            PolicyRow("ppo", 256, 14.3, 0.52, 0.91, 0.79, 0.02, 3.6, 4.71, 1.13),
        ],
        samples=[
            Sample(
                "Review: a film of such",
                {
                    "sft": Response("the story that it's not to be a movie", {"ridge judge": -0.41, "VADER": 0.0}),
                    "ppo": Response("a warm and beautiful performance.", {"ridge judge": 1.92, "VADER": 0.83}),
                },
            ),
            Sample(
                "Review: <script>alert(1)</script>",
                {
                    "sft": Response("", {"ridge judge": 0.0, "VADER": 0.0}),
                    "ppo": Response(HOSTILE, {"ridge judge": 0.4, "VADER": 0.2}),
                },
            ),
        ],
    )


def write_run(root: Path, steps: int = 45) -> Path:
    """Pretrain, SFT, reward and PPO metrics that fall and rise as they should, two attempts, one evaluation."""
    rng = np.random.default_rng(0)
    curves = {"pretrain": (7.6, 5.1, 700), "sft": (5.4, 4.9, 166)}
    for stage, (first, last, count) in curves.items():
        losses = last + (first - last) * np.exp(-np.arange(count) / (count / 6)) + rng.normal(0, 0.06, count)
        lines = [{"step": i, "loss/train": float(v), "lr": 1e-3} for i, v in enumerate(losses)]
        every = count // 7
        held_out = [{"step": i, "loss/validation": float(losses[i] + 0.04)} for i in range(every, count, every)]
        write_lines(root / stage / "metrics.jsonl", lines + held_out)
    share = 0.5 + 0.12 * (1 - np.exp(-np.arange(300) / 60)) + rng.normal(0, 0.03, 300)
    reward = [{"step": i, "train/rm/loss": float(1.19 - a), "train/rm/accuracy": float(a)} for i, a in enumerate(share)]
    write_lines(root / "reward" / "metrics.jsonl", [*reward, {"step": 299, "eval/rm/accuracy": 0.61}])
    write_lines(root / "ppo" / "metrics.jsonl", [_ppo_line(i, i / steps, rng) for i in range(steps)])
    (root / "config.yaml").write_text(CONFIG, "utf-8")
    recipe = {"stages": {stage: {"steps": 1} for stage in ("pretrain", "sft", "reward", "ppo", "evaluate")}}
    last = {"attempt": 2, "status": "done", "versions": {"jax": "0.10.2"}, "config": recipe}
    write_lines(root / "manifest.jsonl", [{"attempt": 1, "status": "preempted"}, last])
    (root / "evaluate").mkdir()
    (root / "evaluate" / "evaluation.json").write_text(example_evaluation().to_json(), "utf-8")
    return root


def _ppo_line(step: int, done: float, rng: np.random.Generator) -> dict[str, float]:
    kl = 9 * done**1.4
    return {
        "step": step,
        "objective/scores": float(2.2 * done**0.7 + rng.normal(0, 0.12)),
        "objective/rlhf_reward": float(2.2 * done**0.7 - 0.05 * kl + rng.normal(0, 0.12)),
        "objective/kl": float(kl + abs(rng.normal(0, 0.15))),
        "objective/entropy": float(4.9 - 1.0 * done + rng.normal(0, 0.03)),
        "objective/length": float(14.5 - 3 * done + rng.normal(0, 0.3)),
        "objective/eos_rate": float(min(1.0, 0.71 + 0.22 * done + rng.normal(0, 0.02))),
    }


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def evaluation() -> Evaluation:
    return example_evaluation()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "movies-rlhf").mkdir()
    return write_run(tmp_path / "movies-rlhf")
