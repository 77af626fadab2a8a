"""The table of what was planned and what was measured."""

from rlhfjax.evaluation.report.planned import planned_rows

PLAN = {"seconds": {"ppo": {"timing/update_s": 2.0, "timing/rollout_s": 0.5}, "sft": {"timing/step_s": 1.0}}}


def test_the_median_after_the_first_row_is_beside_the_plan():
    updates = (90.0, 3.0, 2.5, 4.0)  # the first one has compiled
    rows = [{"step": step, "timing/update_s": value} for step, value in enumerate(updates)]
    rows[2]["timing/rollout_s"] = 0.25
    found = planned_rows([{"plan": PLAN}, {"attempt": 2}], {"ppo": rows})
    assert found == [["ppo update", "2.000", "3.000", "1.50"], ["ppo rollout", "0.500", "0.250", "0.50"]]


def test_a_run_without_a_plan_has_no_table():
    assert planned_rows([{"attempt": 1}], {"ppo": [{"timing/update_s": 1.0}] * 3}) == []
