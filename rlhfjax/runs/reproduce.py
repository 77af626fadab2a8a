"""A finished run, done again: what must be as it was before, and whether step for step the same came out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlhfjax.config import load_config, resolved, schema
from rlhfjax.config.recipe import stages_of
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.host.determinism import use_determinism
from rlhfjax.runs.comparison import first_differences
from rlhfjax.runs.conditions import changed_keys, other_conditions
from rlhfjax.runs.manifest import describe, read_attempts
from rlhfjax.runs.recipe import is_complete, report, run_recipe
from rlhfjax.stages.chat_settings import date_of, facts_of_chat

_HOW = "see docs/reliability.md"


def reproduce(run_dir: Path, target: Path, only_check: bool, say: Callable[[str], None] = report) -> None:
    """Run what `run_dir` holds again in `target`, and compare every step; with `only_check` only see if that can be.

    Of several processes all run it, and the first compares. Raises ConfigError where there is no finished run or
    `target` holds something, and IntegrityError with one line a difference where data, code, packages, flags or devices
    are not what they were, or where the runs differ.
    """
    from rlhfjax.host.processes import by_first

    run, attempts = finished(run_dir)
    use_determinism(run.reliability.determinism)
    by_first(partial(_require_same, run_dir, None if only_check else target, run, attempts), "conditions")
    say(f"{run_dir}: code, packages, flags, devices, data and chat settings are those of the run")
    if only_check:
        return
    run_recipe(run, target, date=date_of(run, attempts))
    stages = stages_of(run)
    by_first(partial(_require_equal, run_dir, target, stages), "comparison")
    say(f"{target}: {', '.join(stages)} are equal to those of {run_dir}, step by step and to the last bit")


def require_new(target: Path) -> None:
    """Raises ConfigError for a directory that holds something, in which nothing is reproduced."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: expected a new directory to reproduce in, got one that holds something")


def _require_same(run_dir: Path, target: Path | None, run: schema.Run, attempts: list[dict[str, Any]]) -> None:
    if target:
        require_new(target)
    differences = conditions(run, attempts, run_dir)
    if differences:
        raise IntegrityError(_listed(f"{run_dir} cannot be reproduced here: {_counted(differences)}", differences))


def _require_equal(run_dir: Path, target: Path, stages: list[str]) -> None:
    found = first_differences(run_dir, target, stages)
    if found:
        raise IntegrityError(_listed(f"{target} differs from {run_dir}: {_counted(found)}", found))


def conditions(run: schema.Run, attempts: list[dict[str, Any]], run_dir: Path | None = None) -> list[str]:
    """What is not now as it was in the attempts that trained anything, one line each.

    What the run kept in `run_dir` says which rows and which line of a chat template it is.
    """
    from rlhfjax.runs.checks import entries
    from rlhfjax.runs.inputs import inputs_now
    from rlhfjax.runs.kept_rows import changed_rows
    from rlhfjax.runs.templates import other_tokenizer

    last = attempts[-1]
    found = [f"config.yaml: {line}" for line in changed_keys(last["config"], resolved(run))]
    now = describe(run) | {"chat": facts_of_chat(run, date_of(run, attempts))}
    inputs, problems = inputs_now(run)
    if run_dir:
        inputs["changed_rows"] = changed_rows(run, run_dir, entries(run), last.get("data", {}))
        problems = [*other_tokenizer(run, run_dir), *problems]
    for attempt in attempts:
        if attempt.get("stages", True):
            where = "" if attempt is last else f"attempt {attempt['attempt']}: "
            found += [f"{where}{line}" for line in other_conditions(attempt, now | inputs)]
    return list(dict.fromkeys(found + problems))


def finished(run_dir: Path) -> tuple[schema.Run, list[dict[str, Any]]]:
    """The configuration of a finished run and its attempts. Raises ConfigError, or IntegrityError for its manifest."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: expected the directory of a run, got no config.yaml in it")
    run = load_config(run_dir / "config.yaml")
    try:
        attempts = read_attempts(run_dir)
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{run_dir / 'manifest.jsonl'}: expected a JSON object a line, got {error}") from None
    missing = [stage for stage in stages_of(run) if not is_complete(run_dir, stage)]
    if missing or not attempts:
        raise ConfigError(f"{run_dir}: expected a finished run, got one without {', '.join(missing) or 'a manifest'}")
    if "code" not in attempts[-1]:
        raise ConfigError(f"{run_dir}: an older version made it, and its manifest does not say enough; {_HOW}")
    return run, attempts


def _listed(title: str, lines: list[str]) -> str:
    return "\n  ".join([title, *lines])


def _counted(lines: list[str]) -> str:
    return f"{len(lines)} differences" if len(lines) > 1 else "1 difference"
