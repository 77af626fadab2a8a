"""PPO and GRPO under a moderation policy: what is flagged is counted, and so is what is dropped."""

import json
import shutil

import numpy as np
import pytest

from stages.conftest import rows_of
from stages.tiny_recipe import STEPS, recipe

POLICY = "backends: [{rules: {shipped: false, files: [RULES]}}]"
RULES = "patterns: {violence: [{find: [[a*, b*, c*, d*, e*, f*, g*, w*]], within: 0}]}"
BEFORE = ("tokenizer", "pretrain", "sft", "reward")


@pytest.mark.slow
@pytest.mark.parametrize("flagged", ["penalise", "drop"])
def test_counts_are_those_of_the_samples(flagged, files, finished, command, tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES, encoding="utf-8")
    (tmp_path / "policy.yaml").write_text(POLICY.replace("RULES", f"{tmp_path}/rules.yaml"), encoding="utf-8")
    tree = recipe(files)
    term = {"moderation": {"policy": f"{tmp_path}/policy.yaml", "flagged": flagged}, "weight": 0.5}
    ppo = tree["stages"].pop("ppo") | {"rewards": [{"model": "reward"}, term]}
    size = ppo["batch"]["size"]
    grpo = {key: ppo[key] for key in ("data", "steps", "batch", "sampling", "optimizer", "rewards")}
    tree["stages"] = {name: tree["stages"][name] for name in BEFORE[1:]} | {
        "ppo": ppo,
        "grpo": grpo | {"groups": {"size": 4}},
    }
    tree |= {"logging": {"samples_every": 1, "samples": size}}
    (tmp_path / "run.yaml").write_text(json.dumps(tree), encoding="utf-8")
    for earlier in BEFORE:
        shutil.copytree(finished / earlier, tmp_path / "run" / earlier)
    code, _, err = command("run", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    assert code == 0, err
    for stage in ("ppo", "grpo"):
        rows = rows_of(tmp_path / "run" / stage / "metrics.jsonl")
        samples = rows_of(tmp_path / "run" / stage / "samples.jsonl")
        assert len(samples) == size * STEPS
        judged = np.reshape([sample["rewards"]["moderation"] for sample in samples], (STEPS, size))
        counts = (judged < 0).sum(axis=1)
        assert 0 < counts.sum() < size * STEPS  # both happen
        assert [row["objective/flagged/moderation"] for row in rows] == counts.tolist()
        assert [row.get("objective/dropped") for row in rows] == (
            counts.tolist() if flagged == "drop" else [None] * STEPS
        )
        assert np.isfinite([row["loss/policy_avg"] for row in rows]).all()
        assert all(sample["response"] for sample in samples if sample["rewards"]["moderation"] < 0)
