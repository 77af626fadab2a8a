"""GRPO and RLOO through the online hall, with rewards that are found on the host, through the command line."""

import json
import shutil

import pytest

from rlhfjax.evaluation.report.run_data import read_run
from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STEPS, recipe, write_jsonl

BEFORE = ("tokenizer", "pretrain", "sft", "reward")
WEIGHTS = {"model": 0.0, "letters": 0.5, "length": 0.0, "numeric_match": 1.0}
# Responses to prompts with the answer 0 are all alike, which dynamic sampling passes over.
FUNCTION = """
def letters(examples):
    answers = [int(e.record["answer"]) for e in examples]
    return [answer and answer + len(e.response) / 10 for answer, e in zip(answers, examples)]
"""
STAGES = {
    "grpo": {"groups": {"size": 4, "draws": 2}, "loss": {"clip_high": 0.28, "average": "token"}},
    "rloo": {"groups": {"size": 2}},
}


@pytest.fixture(scope="module")
def grouped(files, finished, command, tmp_path_factory):
    """Runs a stage after those of the finished run: (exit code, run directory, what was said)."""
    folder = tmp_path_factory.mktemp("groups")
    (folder / "mine.py").write_text(FUNCTION, encoding="utf-8")
    words = ["the film", "a story was", "the ending", "good music"]
    write_jsonl(folder / "asked.jsonl", ({"prompt": words[i % 4], "answer": str(i % 4 % 3)} for i in range(20)))
    kinds = {"model": "reward"}, {"function": f"{folder}/mine.py:letters"}, {"length": {"target": 3}}
    kinds = *kinds, {"numeric_match": {"field": "answer"}}
    terms = [kind | {"weight": weight} for kind, weight in zip(kinds, WEIGHTS.values(), strict=True)]
    made = {}

    def run(stage, name="run", **changes):
        if (stage, name) in made:
            return made[stage, name]
        tree = recipe(files)
        ppo, run_dir = tree["stages"]["ppo"], folder / stage / name
        shared = {key: ppo[key] for key in ("steps", "batch", "sampling", "optimizer", "ptx")}
        shared |= {"data": [{"source": str(folder / "asked.jsonl")}], "rewards": terms}
        shared |= {"missing_eos": {"mode": "keep"}}
        kept = {key: tree["stages"][key] for key in BEFORE[1:]}
        tree["stages"] = kept | {stage: shared | STAGES[stage]} | {"evaluate": tree["stages"]["evaluate"]}
        tree |= changes
        run_dir.mkdir(parents=True)
        for earlier in BEFORE:
            shutil.copytree(finished / earlier, run_dir / earlier)
        (run_dir.parent / f"{name}.yaml").write_text(json.dumps(tree), encoding="utf-8")
        code, _, err = command("run", run_dir.parent / f"{name}.yaml", "--run-dir", run_dir)
        assert code == 0, err
        made[stage, name] = run_dir
        return run_dir

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_the_score_is_the_weighted_sum_of_the_rewards_each_of_which_is_told(grouped, stage):
    run_dir = grouped(stage)
    for row in rows_of(run_dir / stage / "samples.jsonl"):
        wanted = sum(weight * row["rewards"][name] for name, weight in WEIGHTS.items())
        assert row["score"] == pytest.approx(wanted, abs=1e-5)
        assert row["rewards"]["length"] == pytest.approx(-abs(row["length"] - 3) / 3)
        answer = {"the film": 0, "a story was": 1, "the ending": 2, "good music": 0}[row["prompt"]]
        assert row["rewards"]["letters"] == pytest.approx(answer and answer + len(row["response"]) / 10)
    rows = rows_of(run_dir / stage / "metrics.jsonl")
    assert len(rows) == STEPS
    for row in rows:
        wanted = sum(weight * row[f"objective/reward/{name}"] for name, weight in WEIGHTS.items())
        assert row["objective/scores"] == pytest.approx(wanted, abs=1e-4)
        assert row["objective/reward_failures"] == 0
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # it starts as the reference
    assert rows[0]["policy/first_minibatch_ratio_err"] < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_responses_to_a_prompt_are_several_and_differ(grouped, stage):
    size = STAGES[stage]["groups"]["size"]
    rows = [row for row in rows_of(grouped(stage) / stage / "samples.jsonl") if row["step"] == 1]
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    assert all(len({row["prompt"] for row in group}) == 1 for group in groups)
    assert any(len({row["response"] for row in group}) > 1 for group in groups)


@pytest.mark.parametrize("stage", STAGES)
def test_the_stage_is_evaluated_and_in_the_report(grouped, stage):
    found = read_run(grouped(stage)).evaluation
    assert [policy.name for policy in found.policies] == ["sft", stage]
    assert list(found.heldout_losses) == ["pretrain", "sft", stage]
    assert stage in found.stage_seconds
    assert f"Online training: {stage}" in (grouped(stage) / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_stopped_ends_the_same(grouped, command, tmp_path, stage):
    # fails for grpo when the batches of prompts that were drawn beyond the first are forgotten: seen
    straight, run_dir = grouped(stage), tmp_path / "run"
    draws = [row.get("objective/draws", 1) for row in rows_of(straight / stage / "metrics.jsonl")]
    assert (max(draws[: STEPS - 1]) > 1) == (stage == "grpo")
    shutil.copytree(straight, run_dir)
    (run_dir / stage / "complete.json").unlink()
    shutil.rmtree(run_dir / stage / "checkpoints" / str(STEPS))
    code, _, err = command("run", straight.parent / "run.yaml", "--run-dir", run_dir, "--only", stage)
    assert code == 0, err
    assert_same_bits(*(saved(place / stage / "checkpoints" / str(STEPS)) for place in (run_dir, straight)))


def test_code_that_changed_is_refused_by_the_stage_that_has_begun(grouped, command, tmp_path):
    straight, run_dir = grouped("rloo"), tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "rloo" / "complete.json").unlink()
    code = straight.parent.parent / "mine.py"
    code.write_text(FUNCTION.replace("/ 10", "/ 20"), encoding="utf-8")
    try:
        said = command("run", straight.parent / "run.yaml", "--run-dir", run_dir, "--only", "rloo")
        assert (said[0], "mine.py has changed since this stage began" in said[2]) == (3, True), said[2]
        said = command("reproduce", straight, "--only-check")
        assert (said[0], "rewards of rloo: " in said[2]) == (4, True), said[2]
    finally:
        code.write_text(FUNCTION, encoding="utf-8")
