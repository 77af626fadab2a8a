"""What is proposed against each mistake fits when it is planned whole, by the compiler of its machine."""

from dataclasses import replace

import pytest

from planning.test_mistakes import MISTAKES, question_of
from rlhfjax.errors import ConfigError
from rlhfjax.planning.changes import changed_by
from rlhfjax.planning.plan import planned, refuse
from rlhfjax.planning.programs import Limits
from rlhfjax.planning.repairs import repairs

pytestmark = pytest.mark.remedies
WITH_REMEDY = sorted(name for name, mistake in MISTAKES.items() if mistake.remedy)


def first_proposal(question, flagged):
    """Overrides as the refusal shows them for pasting."""
    if flagged:
        return repairs(question.run, question.machine.devices, question.machine.slices)[0]
    with pytest.raises(ConfigError) as told:
        refuse(question)
    return tuple(str(told.value).split("\n  change: ")[1].split())


@pytest.mark.parametrize("name", WITH_REMEDY)
def test_the_first_proposal_plans_as_fitting(name):
    mistake = MISTAKES[name]
    if mistake.topology:
        pytest.importorskip("libtpu")
    question = replace(question_of(mistake), limits=Limits(seconds=3600))
    overrides = first_proposal(question, mistake.flagged)
    plan = planned(question.on(changed_by(question.run, overrides)), print)
    assert plan["fits"], (overrides, plan["reasons"])
    assert all("failed" not in step for step in plan["steps"].values())
