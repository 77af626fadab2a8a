"""Moderation as a reward: a policy judges the responses in a process of its own."""

from pathlib import Path

import numpy as np
import pytest

from rlhfjax.config.rewards import KINDS
from rlhfjax.errors import ConfigError, RewardError
from rlhfjax.rewards import Example, Rewards, facts_of, refuse_other_code

POLICY = "backends: [{rules: {shipped: false, files: [rules.yaml]}}]\ncategories: {violence: {output: flag}}\n"
RULES = "patterns: {violence: [{find: [[fight]]}], hate: [{find: [[nasty]]}]}"
EXAMPLES = [Example("How?", text) for text in ("calm", "a FIGHT", "", "so n.a.s.t.y", "fighter")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(POLICY, encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(RULES, encoding="utf-8")
    return tmp_path


def term(policy="policy.yaml", **settings):
    return KINDS["moderation"].model_validate({"moderation": {"policy": policy}} | settings)


def test_what_a_policy_flags_is_punished_and_an_edit_of_it_ends_the_run(folder):
    with Rewards.open([term(weight=0.5, name="kind")]) as rewards:
        scores = rewards.submit(1, EXAMPLES).result()
        np.testing.assert_array_equal(scores.values["kind"], [0, -1, 0, -1, 0])
        np.testing.assert_array_equal(scores.total, [0, -0.5, 0, -0.5, 0])
        Path("rules.yaml").write_text(RULES.replace("fight", "calm"), encoding="utf-8")
        with pytest.raises(RewardError, match=r"reward kind: rules\.yaml was edited since this run began"):
            rewards.submit(2, EXAMPLES)


def test_a_policy_is_noted_with_the_files_it_is_made_of(folder):
    fact = facts_of([term()])["moderation"]
    assert (fact["kind"], fact["policy"], list(fact["sha256"])) == (
        *("moderation", "policy.yaml"),
        ["policy.yaml", "rules.yaml"],
    )
    assert facts_of([term("default")])["moderation"]["sha256"] == {}
    before = facts_of([term()])
    Path("rules.yaml").write_text(RULES + "\n", encoding="utf-8")
    with pytest.raises(Exception, match=r"rules\.yaml has changed since this stage began"):
        refuse_other_code("ppo", [before], facts_of([term()]))


def test_a_policy_that_cannot_be_read_is_an_error_before_anything_is_trained(folder):
    Path("policy.yaml").write_text("backends: []", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"policy\.yaml:1: backends: expected a list"):
        Rewards.open([term()])


@pytest.mark.parametrize(
    ("on_error", "wanted"), [({}, None), ({"on_error": "value", "value": -0.5}, [-0.5, -0.5, 0, -0.5, -0.5])]
)
def test_a_service_that_is_away_is_a_reward_that_fails(folder, on_error, wanted):
    Path("policy.yaml").write_text('backends: [{url: {url: "http://127.0.0.1:1/v1", timeout: 5}}]', encoding="utf-8")
    with Rewards.open([term(**on_error)]) as rewards:
        pending = rewards.submit(3, EXAMPLES)
        if wanted is None:
            with pytest.raises(
                RewardError, match=r"reward moderation, step 3: http://127\.0\.0\.1:1/v1/moderations: can"
            ):
                pending.result()
        else:
            np.testing.assert_array_equal(pending.result().total, np.float32(wanted))
