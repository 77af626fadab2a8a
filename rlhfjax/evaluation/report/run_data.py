"""Reads what a run left behind: its configuration, its attempts, the metrics of each stage, its evaluation."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhfjax.config.recipe import FACTS, NAMES, TOKENIZER
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.evaluation.results import Evaluation
from rlhfjax.host.goodput import Account, account_of
from rlhfjax.plain_json import number


@dataclass(frozen=True)
class ReportData:
    """A run as the report sees it; whatever did not run is empty. `metrics[stage]` is one dict per step,
    `served[stage]` the step that a finished stage hands on, `time` what became of each second."""

    name: str
    config: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    served: dict[str, int] = field(default_factory=dict)
    time: Account | None = None

    @property
    def stages(self) -> list[str]:
        """The stages of the recipe and all that left metrics or were timed, in the recipe's order; unknown ones last.

        Of a run that does not say its recipe these are all stages that there are.
        """
        seconds = self.evaluation.stage_seconds if self.evaluation else {}
        there = {*self.recipe, *self.metrics, *seconds} if self.recipe else {*NAMES, *self.metrics, *seconds}
        return [*(name for name in NAMES if name in there), *sorted(there.difference(NAMES))]

    @property
    def recipe(self) -> list[str]:
        """The stages of the configuration that the last attempt ran with; none where no attempt says it."""
        told = self.attempts[-1].get("config") if self.attempts else None
        stages = told.get("stages") if isinstance(told, dict) else None
        wanted = [name for name, section in stages.items() if section] if isinstance(stages, dict) else []
        return [TOKENIZER, *wanted] if wanted else []

    def series(self, stage: str, *names: str) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
        """The steps and values of the first of these metrics that the stage logged; two empty arrays if none."""
        rows = self.metrics.get(stage, [])
        for name in names:
            found = [
                (float(row.get("step", i)), value)
                for i, row in enumerate(rows)
                if (value := number(row.get(name))) is not None
            ]
            if found:
                steps, values = np.array(sorted(found)).T
                return steps, values
        return np.zeros(0), np.zeros(0)

    @property
    def online_stages(self) -> list[str]:
        """The stages that sampled from a policy and measured its divergence from the reference."""
        return [stage for stage in self.stages if self.series(stage, "objective/kl")[0].size]


def unit_of(stage: str) -> str:
    """The unit of a stage's loss; "loss" of a stage that is not of the recipe."""
    return FACTS[stage].unit if stage in FACTS else "loss"


def read_run(run_dir: str | Path) -> ReportData:
    """Reads a run directory; files that are not there leave their part empty.

    After a resume the later line of a step holds. Raises ConfigError when the directory does not exist, DataError for a
    file that cannot be read, except for a last line cut short by a killed run.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise ConfigError(f"expected the directory of a run, got {root}, which is not a directory")
    config, evaluation = root / "config.yaml", root / "evaluate" / "evaluation.json"
    folders = sorted(path.parent.name for path in root.glob("*/metrics.jsonl"))
    return ReportData(
        name=root.resolve().name,
        config=config.read_text("utf-8") if config.is_file() else "",
        attempts=_read_lines(root / "manifest.jsonl"),
        metrics={stage: _last_of_each_step(_read_lines(root / stage / "metrics.jsonl")) for stage in folders},
        evaluation=Evaluation.from_json(evaluation.read_text("utf-8"), evaluation) if evaluation.is_file() else None,
        served={path.parent.name: step for path in root.glob("*/complete.json") if (step := _step(path)) is not None},
        time=account_of(root),
    )


def _step(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text("utf-8"))["step"])
    except (ValueError, KeyError, TypeError):  # a stage without steps
        return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").rstrip("\n").split("\n")  # splitlines would also cut at U+2028 inside a text
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if place == len(lines):
                break
            raise DataError(f"{path}:{place}: expected one JSON object a line, got {line[:60]!r}") from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _last_of_each_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step. Rows that share a step are merged, the later value holding: training and evaluation of a step
    may be logged apart, and a resumed run logs again what came after its checkpoint."""
    merged: dict[Any, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        key = row.get("step", f"line {i}")
        merged[key] = {**merged.get(key, {}), **row}
    return list(merged.values())
