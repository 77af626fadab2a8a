"""What a plan said of the steps of a run, beside what they took."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.evaluation.report.display import number
from rlhfjax.plain_json import number as number_of

_FIRST = 1  # rows of a stage whose programs are still being compiled


def planned_rows(attempts: Sequence[Mapping[str, Any]], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list:
    """Stage, unit, seconds planned, their median as measured, and how often the plan that is.

    Of the last attempt that was held to a plan; empty where none was.
    """
    plan = next((told for line in reversed(attempts) if isinstance(told := line.get("plan"), dict)), {})
    rows = []
    for stage, units in plan.get("seconds", {}).items():
        for name, planned in units.items():
            taken = [
                value for row in metrics.get(stage, [])[_FIRST:] if (value := number_of(row.get(name))) is not None
            ]
            if taken and planned:
                unit, measured = name.removeprefix("timing/").removesuffix("_s"), statistics.median(taken)
                rows.append([f"{stage} {unit}", number(planned, 3), number(measured, 3), f"{measured / planned:.2f}"])
    return rows
