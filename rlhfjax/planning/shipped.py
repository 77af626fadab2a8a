"""The folder that a plan with `--programs` leaves, as a run takes it: its contract, and where its programs are."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhfjax.config import Run, config_hash, resolved
from rlhfjax.errors import ConfigError
from rlhfjax.planning.versions import versions
from rlhfjax.stages.contract import Contract

PLAN, COMPILED = "plan.json", "compiled"
_SHOWN = 3


def contract_of(directory: Path, run: Run) -> Contract:
    """The contract of a run with a plan. Raises ConfigError for a folder without one, and for one that does not fit."""
    file = directory / PLAN
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        steps, name = dict(plan["steps"]), str(plan["topology"])
    except FileNotFoundError:
        raise ConfigError(
            f"--plan {directory}: expected a folder that `rlhfjax plan CONFIG --programs DIR` left, got no {PLAN} there"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--plan {file}: expected a plan, got {type(error).__name__}: {error}; plan anew") from None
    if not plan.get("fits"):
        raise ConfigError(f"--plan {directory}: {name} does not hold this recipe: {plan['reasons'][0]}")
    return Contract(steps, tuple(_apart(plan, run)), str(directory / COMPILED))


def _apart(plan: Mapping[str, Any], run: Run) -> Iterator[str]:
    """How a run differs from what was planned."""
    if plan["config_hash"] != config_hash(run):
        keys = list(_different(plan["config"], resolved(run)))
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        yield f"the configuration is another: {'; '.join(keys[:_SHOWN])}{more}"
    here = versions()
    for package, planned in plan["versions"].items():
        if here.get(package) != planned:
            yield f"{package} is {here.get(package, 'not installed')}, planned with {planned}"


def _different(planned: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(planned, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*planned, *now]):
            yield from _different(planned.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif planned != now:
        yield f"{key} was {planned}, is {now}"
