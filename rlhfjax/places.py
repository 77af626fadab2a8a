"""Directories of this user, and paths that begin with ~. A container's user may have neither a name nor a home."""

import os
from pathlib import Path

from rlhfjax.errors import DataError


def user_cache(what: str, remedy: str) -> Path:
    """`$XDG_CACHE_HOME/rlhfjax/WHAT`, or the same under `~/.cache`.

    Raises DataError, which says `remedy`, for a user without a home and with neither variable set.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhfjax" / what
    except RuntimeError:
        raise DataError(
            f"no place for {what}: user {os.getuid()} has no home directory, and HOME is not set; give another one: "
            f"{remedy} or XDG_CACHE_HOME"
        ) from None


def expanded(path: str | Path) -> Path:
    """The path with ~ and ~NAME replaced by home directories. Raises DataError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(
            f"{path}: expected a path, got one that begins with the home directory of a user who has none; write it out"
        ) from None
