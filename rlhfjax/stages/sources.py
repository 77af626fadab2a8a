"""Rules for the data of a recipe: one form throughout, and that a stage which has begun goes on with the same."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.recipe import entries_of
from rlhfjax.errors import DataError


def two_forms(forms: Mapping[str, set[str]]) -> Iterator[str]:
    """A line where a recipe has both messages, which are written as conversations, and plain prompts, which are not.

    `forms` are by stage what its sources hold. It may be meant, so it is no error.
    """
    mixed = [stage for stage, held in forms.items() if len(held) > 1]
    messages = [stage for stage, held in forms.items() if held == {"messages"}]
    plain = [stage for stage, held in forms.items() if held == {"plain"}]
    told = "messages are written with the tokens of roles, plain prompts without; use one form throughout a recipe"
    for stage in mixed:
        yield f"{stage} reads both messages and plain prompts: {told}"
    if not mixed and messages and plain:
        yield f"{', '.join(messages)} read messages, {', '.join(plain)} plain prompts: {told}"


def refuse_other_data(
    run: Run, run_dir: Path, stage: str, before: Sequence[Mapping[str, Any]], now: Mapping[str, str]
) -> None:
    """Raises DataError when a stage that has saved steps would go on with other data than it began with.

    `before` are the attempts of the run, oldest first, `now` the fingerprints of this one by SOURCE@SPLIT.
    """
    steps = run_dir / stage / "checkpoints"
    if not any(path.name.isdigit() for path in steps.glob("*")):
        return
    for name in sorted({entry.name for entry, _ in entries_of(run, stage)}):
        known = [attempt["data"][name] for attempt in before if name in attempt.get("data", {})]
        if known and name in now and known[-1] != now[name]:
            raise DataError(
                f"stages.{stage}: {name} has changed since this stage began: expected fingerprint {known[-1][:12]}…, "
                f"got {now[name][:12]}…; put the data back, or do the stage again with --from {stage}"
            )
