"""Every stage of the recipe is in the report, with its unit, its time and its place."""

import pytest

from benchmarks.collect import _stage_seconds
from rlhfjax.config.recipe import FACTS, NAMES
from rlhfjax.evaluation.report.display import duration
from rlhfjax.evaluation.report.page import render_report
from rlhfjax.evaluation.report.run_data import read_run
from rlhfjax.evaluation.report.summary import summary_rows
from rlhfjax.evaluation.results import Evaluation

from ..conftest import write_lines

OFFLINE = [name for name, facts in FACTS.items() if facts.role and not facts.online]


@pytest.fixture
def whole(tmp_path):
    """A run of every stage that there is; the i-th took i minutes."""
    for name, facts in FACTS.items():
        loss = "train/rm/loss" if facts.role == "reward" else "loss/train"
        metric = "objective/kl" if facts.online else loss
        if facts.role:
            rows = [{"step": step, metric: 3.0 - step, "objective/scores": 1.0} for step in (1, 2)]
            write_lines(tmp_path / name / "metrics.jsonl", rows)
    seconds = {name: 60.0 * place for place, name in enumerate(NAMES, 1)}
    for name, took in seconds.items():
        write_lines(tmp_path / name / "complete.json", [{"stage": name, "seconds": took}])
    found = Evaluation(0, "", "", stage_seconds=seconds)
    (tmp_path / "evaluate" / "evaluation.json").write_text(found.to_json(), "utf-8")
    return tmp_path


def test_each_has_a_row_in_order_with_its_time(whole):
    # dpo came after evaluate, without a time: seen
    rows = summary_rows(read_run(whole))
    assert [(row.stage, row.time) for row in rows] == [(name, duration(60.0 * i)) for i, name in enumerate(NAMES, 1)]
    assert all(row.figure for row in rows)


@pytest.mark.parametrize("stage", OFFLINE)
def test_each_curve_has_the_unit_of_the_stage(whole, stage):
    # dpo's loss was shown in nats per token: seen
    page = render_report(read_run(whole))
    figure = page.split(f'aria-label="Loss of the {stage} stage over its steps"')[1].split("</svg>")[0]
    assert FACTS[stage].unit in figure


def test_a_sum_of_rewards_is_called_one_and_each_of_them_has_its_curve(whole):
    # the sum was called the reward model's score, in a run without such a model, too: seen
    sums = {
        "objective/kl": 1.0,
        "objective/scores": 1.0,
        "objective/reward/exact": 2.0,
        "objective/reward/length": -1.0,
    }
    write_lines(whole / "grpo" / "metrics.jsonl", [{"step": step} | sums for step in (1, 2)])
    page = render_report(read_run(whole))
    curves, frontier, *_ = (part.split("<section")[0] for part in page.split("grpo</h2>")[1:])
    for title in ("Weighted sum of the rewards", "Reward: exact", "Reward: length"):
        assert f'aria-label="{title} over the steps of grpo"' in curves
    assert "Reward model score" not in curves + frontier
    assert "weighted sum of the rewards" in frontier
    assert 'aria-label="Reward model score over the steps of ppo"' in page


def test_the_loss_of_dpo_is_per_pair_and_its_accuracy_is_shown(whole):
    rows = [{"step": step, "loss/train": 0.7 - 0.1 * step, "eval/dpo/accuracy": 0.5 + 0.1 * step} for step in (1, 2)]
    write_lines(whole / "dpo" / "metrics.jsonl", rows)
    figure = next(row.figure for row in summary_rows(read_run(whole)) if row.stage == "dpo")
    assert figure == "loss 0.60 → 0.50 nats per ranked pair, orders 70.0\u00a0% of held-out pairs right"


def test_the_wall_time_of_all_stages_is_that_of_each(whole):
    assert _stage_seconds(whole) == {name: 60.0 * place for place, name in enumerate(NAMES, 1)}


def test_a_recipe_shows_its_own_stages_alone(whole):
    config = {"stages": {"sft": {"steps": 2}, "dpo": {"steps": 2}, "ppo": None}}
    write_lines(whole / "manifest.jsonl", [{"attempt": 1, "config": config}])
    for name in NAMES:
        if name not in ("tokenizer", "sft", "dpo"):
            for file in (whole / name).iterdir():
                file.unlink()
    run = read_run(whole)
    assert run.stages == ["tokenizer", "sft", "dpo"]
    assert "Online training" not in render_report(run)
