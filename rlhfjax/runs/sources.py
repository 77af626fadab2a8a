"""Rules for the data of a recipe: one form throughout, and that a stage which has begun goes on with the same."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.recipe import entries_of, online
from rlhfjax.errors import DataError
from rlhfjax.rewards import facts_of, refuse_other_code


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


def rewards_of(run: Run) -> dict[str, dict[str, Any]]:
    """Facts of the rewards of each online stage, with the digests of their code. Raises ConfigError."""
    return {stage: facts_of(section.rewards) for stage, section in online(run)}


def refuse_other_inputs(
    run: Run, run_dir: Path, stage: str, before: Sequence[Mapping[str, Any]], begins: Mapping[str, Any]
) -> None:
    """Raises DataError when a stage that has saved steps would go on with other data, or code, than it began with.

    `before` are the attempts of the run, oldest first, `begins` what this one starts from.
    """
    steps = run_dir / stage / "checkpoints"
    if not any(path.name.isdigit() for path in steps.glob("*")):
        return
    now = begins["data"]
    for name in sorted({entry.name for entry, _ in entries_of(run, stage)}):
        known = [attempt["data"][name] for attempt in before if name in attempt.get("data", {})]
        if known and name in now and known[-1] != now[name]:
            raise DataError(
                f"stages.{stage}: {name} has changed since this stage began: expected fingerprint {known[-1][:12]}…, "
                f"got {now[name][:12]}…; put the data back, or do the stage again with --from {stage}"
            )
    if stage in begins["rewards"]:
        rewards = [attempt["rewards"][stage] for attempt in before if stage in attempt.get("rewards", {})]
        refuse_other_code(stage, rewards, begins["rewards"][stage])
