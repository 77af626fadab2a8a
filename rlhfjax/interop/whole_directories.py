"""Directories that are there as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhfjax.errors import ConfigError


def check_target(target: Path, marker: str, force: bool) -> None:
    """Raises ConfigError when `target` holds something, unless it may be replaced.

    With `force` only a directory that this program wrote, which `marker` shows, may be: nobody's own files go.
    """
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    if not force:
        raise ConfigError(f"{target}: exists already; choose another path, or --force to replace it")
    if target.is_symlink() or not (target / marker).is_file():
        raise ConfigError(f"{target}: --force replaces only what rlhfjax wrote there, and it has no {marker}")


@contextmanager
def whole_directory(target: Path, marker: str, force: bool = False) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends well and goes when it does not.

    Everything is on disk before the place is taken; files are for their owner only. Raises as `check_target`.
    """
    target = Path(os.path.abspath(target))
    check_target(target, marker, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))  # mode 0700
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose another path") from error
    try:
        yield part
        _make_private_and_durable(part)
        check_target(target, marker, force)
        if target.is_dir():
            old = part.with_suffix(".old")
            os.rename(target, old)
            os.rename(part, target)
            shutil.rmtree(old)
        else:
            os.rename(part, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _make_private_and_durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
