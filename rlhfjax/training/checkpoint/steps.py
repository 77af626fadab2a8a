"""Step directories on the disk: when one counts, what a killed process left, and room for the next.

A step is written as `STEP.part`. Its manifest comes last, and only then does it get its name, so that a directory with
a number for a name is whole whenever a process is killed.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhfjax import stores
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.integrity import bytes_of, sync
from rlhfjax.training.checkpoint.items import Entries, write_manifests

_PART, _REPLACED, _REMOVED, DAMAGED = ".part", ".replaced", ".removed", ".damaged"
_ORBAX = ".orbax-checkpoint-tmp"
ROOM = 1.2  # times what the last step took: a save needs a little more than it leaves


def steps_in(directory: Path) -> list[int]:
    """The steps of a directory in their order; none where it is not there."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit() and path.is_dir())


def unfinished(step_dir: Path) -> Path:
    """Where a step is written before it gets its name."""
    return Path(os.path.abspath(step_dir)).with_name(f"{step_dir.name}{_PART}")


def put_in_place(part: Path, step_dir: Path, arrays: Mapping[str, Mapping[str, str]], known: Entries) -> None:
    """Write the manifests of a step that is whole, and give the step its name; what had that name before goes then."""
    for path in [*part.rglob("*"), part]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    write_manifests(part, arrays, known)
    before = _aside(step_dir, _REPLACED)
    if step_dir.exists():
        os.rename(step_dir, before)
    os.rename(part, step_dir)
    sync(step_dir.parent)
    shutil.rmtree(before, ignore_errors=True)
    stores.publish_step(step_dir)


def remove(step_dir: Path) -> None:
    """Delete a step; killed halfway, it is no step any more."""
    stores.remove(step_dir)
    gone = _aside(step_dir, _REMOVED)
    os.rename(step_dir, gone)
    shutil.rmtree(gone, ignore_errors=True)


def set_aside(step_dir: Path) -> Path:
    """Take a damaged step out of the way, so that nothing reads it and it can be looked at."""
    aside = _aside(step_dir, DAMAGED)
    os.rename(step_dir, aside)
    stores.set_damaged(step_dir)
    return aside


def _aside(step_dir: Path, ending: str) -> Path:
    """A free name to move a step to: `STEP.removed`, or `STEP.2.removed` where the disk did not let the first one go.

    On a network's file system a directory with an open file stays, and a name that is taken would fail the move.
    """
    names = itertools.chain([step_dir.name], (f"{step_dir.name}.{i}" for i in itertools.count(2)))
    return next(path for name in names if not os.path.lexists(path := step_dir.with_name(f"{name}{ending}")))


def tidy(directory: Path, report: Callable[[str], None]) -> None:
    """Remove what a killed process left half done. A step that was about to be replaced gets its name back."""
    for path in sorted(directory.glob("*")):
        name = path.name.partition(".")[0]
        if not name.isdigit() or not path.is_dir():
            continue
        if path.name.endswith(_REPLACED) and not (directory / name).exists():
            os.rename(path, directory / name)
        elif path.name.endswith((_REPLACED, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(_PART) or _ORBAX in path.name:
            shutil.rmtree(path, ignore_errors=True)
            report(f"{directory / name}: was not finished when the process that saved it ended; removed")


def require_writable(directory: Path) -> None:
    """Raises ConfigError when no checkpoint can be written there, which must not be found out at the first save."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=directory))
    except OSError as error:
        raise ConfigError(
            f"{directory}: expected a directory to save checkpoints in, got {error.strerror}; make it writable, or use "
            "another --run-dir"
        ) from None


def shortage(directory: Path, estimate: int) -> str | None:
    """Why a save of about `estimate` bytes has no room, or None; what the last step took is known better."""
    last = max(steps_in(directory), default=None)
    size = (_size(directory / str(last)) if last is not None else None) or estimate
    needed, free = int(ROOM * size), shutil.disk_usage(directory).free
    if free >= needed:
        return None
    return f"{directory}: a checkpoint needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"


def _size(step_dir: Path) -> int | None:
    try:
        return bytes_of(step_dir) or None
    except IntegrityError:  # whoever reads the step will say so
        return None
