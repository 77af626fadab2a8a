"""Small files, written in one piece."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhfjax.errors import Stopped
from rlhfjax.plain_json import dumps


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece, readable by its owner alone."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.chmod(part, 0o600)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece."""
    write_text(path, dumps(value, indent=1) + "\n")


@contextmanager
def saved_or_stopped(folder: Path) -> Iterator[None]:
    """Raises Stopped where the disk does not take the last files of a stage, whose steps it has."""
    try:
        yield
    except OSError as error:
        raise Stopped(
            f"{error.filename or folder}: cannot be written: {error.strerror}; make room or repair the directory, and "
            "run the same command again"
        ) from error
