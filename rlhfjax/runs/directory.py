"""The directory of a run: whose it is, the configuration in it, and what goes when stages are done again.

Names such as `sft` and `config.yaml` are nobody's own: nothing is written to or deleted before it is known to be a
run's.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhfjax import stores
from rlhfjax.config import Run, load_config, resolved, resolved_yaml
from rlhfjax.config.recipe import FACTS, NAMES
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.files import write_text
from rlhfjax.runs.manifest import MANIFEST, read_attempts

COMPLETE = "complete.json"
_FOLDERS = (*NAMES, "base")
_OTHER = "give another --run-dir"


def require_own(run_dir: Path) -> None:
    """Raises ConfigError where `run_dir` holds what no run made under the names that a run uses.

    A run's directory has the config.yaml that a run wrote; without one it holds finished stages alone, as those that
    were copied from another run. Folders of stages are empty, or hold checkpoints or complete.json, or an attempt says
    in the manifest that it began them.
    """
    try:
        _require_own(run_dir)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}; {_OTHER}") from None


def _require_own(run_dir: Path) -> None:
    if not os.path.lexists(run_dir):
        return
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: expected the directory of a run, got a file; {_OTHER}")
    held = [name for name in _FOLDERS if _holds_something(run_dir / name)]
    held += [name for name in (MANIFEST, "report.html") if os.path.lexists(run_dir / name)]
    config = run_dir / "config.yaml"
    if not config.is_file():
        if os.path.lexists(config) or not all(_finished(run_dir / name, name) for name in held):
            raise ConfigError(
                f"{run_dir}: expected a new directory or that of a run, got one without a run's config.yaml that holds "
                f"{', '.join(held) or config.name}; nothing was touched, {_OTHER}"
            )
        return
    begun = _begun(run_dir)
    marked = [name for name in held if any((run_dir / name / mark).exists() for mark in (COMPLETE, "checkpoints"))]
    if begun is None and not marked:
        _require_written(config)
    known = {*marked, *(name for name in begun or () if (run_dir / name).is_dir())}
    foreign = [name for name in _FOLDERS if name in held and name not in known]
    if foreign:
        raise ConfigError(
            f"{run_dir / foreign[0]}: expected the folder of a stage, with checkpoints or {COMPLETE}, got something "
            f"that no run made; nothing was touched, {_OTHER}"
        )


def _finished(folder: Path, stage: str) -> bool:
    """Whether the folder has the mark of this very stage."""
    try:
        return json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["stage"] == stage
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _begun(run_dir: Path) -> set[str] | None:
    """The stages that the attempts of the manifest began; None where there is no manifest."""
    try:
        attempts = read_attempts(run_dir)
        return {stage for attempt in attempts for stage in attempt.get("stages", ())} if attempts else None
    except (ValueError, AttributeError, TypeError):
        raise IntegrityError(
            f"{run_dir / MANIFEST}: expected the attempts of a run, a JSON object a line, got something else; put a "
            f"copy in its place, or {_OTHER}"
        ) from None


def _require_written(config: Path) -> None:
    """Of a run that was killed before it began anything there is only its configuration, as runs write it."""
    try:
        written = config.read_text(encoding="utf-8") == resolved_yaml(load_config(config))
    except (ConfigError, ValueError):
        written = False
    if not written:
        raise ConfigError(f"{config}: no run wrote this, and a run would replace it; nothing was touched, {_OTHER}")


def settle(run: Run, run_dir: Path, start_from: str | None, stages: Sequence[str]) -> None:
    """Make the run directory ready: nothing of the stages that are done again, and its configuration.

    Raises ConfigError for a change that touches a stage that has begun there, and where the disk does not let it.
    """
    _refuse_change(run, run_dir, start_from)
    if start_from:
        redone = stages[stages.index(start_from) :]
        # Killed in between, a stage must not be there whose beginning is not. The model's checkpoint may be another.
        for name in [*reversed(redone), *(["base"] if start_from == stages[0] else [])]:
            _delete(run_dir / name)
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", resolved_yaml(run))
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be written to: {error.strerror}; {_OTHER}") from None


def _delete(folder: Path) -> None:
    """A stage's folder; one that is a link to another disk is emptied. Its mark goes first: then it is not done."""
    if not os.path.lexists(folder):
        return
    try:
        stores.remove(folder)
        (folder / COMPLETE).unlink(missing_ok=True)
        if not folder.is_symlink():
            shutil.rmtree(folder)
            return
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be deleted: {error.strerror}; delete {folder}, or {_OTHER}"
        ) from None


def _refuse_change(run: Run, run_dir: Path, start_from: str | None) -> None:
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    before, now = _flat(resolved(load_config(path))), _flat(resolved(run))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    redone = NAMES[NAMES.index(start_from) :] if start_from else ()
    begun = [stage for stage in NAMES if stage not in redone and (run_dir / stage).exists()]
    refused = [key for key in changed if not key.startswith(_free(begun))]
    if refused:
        shown = "; ".join(f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in refused[:5])
        raise ConfigError(
            f"{run_dir} was made with another configuration: {shown}. Use another --run-dir, or --from STAGE to do "
            "again what the change touches"
        )


def _free(begun: list[str]) -> tuple[str, ...]:
    """What keys that touch nothing of the stages `begun` start with. On another mesh a run continues, rounded anew."""
    if not begun:
        return ("",)
    others = [f"stages.{stage}." for stage in NAMES if stage not in begun]
    if not any(FACTS[stage].adapts for stage in begun):
        others.append("model.lora")
    return (*others, "description", "logging.", "checkpoints.", "reliability.", "profile", "mesh.")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
