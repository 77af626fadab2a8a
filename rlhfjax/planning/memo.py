"""What was found of compiled programs, kept between plans: numbers alone, nothing that runs."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhfjax.errors import RlhfjaxError
from rlhfjax.places import user_cache
from rlhfjax.planning.versions import versions


@dataclass(frozen=True)
class Memo:
    """The file of one program; None where there is no place for any."""

    file: Path | None

    def read(self) -> dict[str, Any] | None:
        """What was written, if it is there and whole."""
        try:
            return json.loads(self.file.read_text(encoding="utf-8")) if self.file else None
        except (OSError, ValueError):
            return None

    def write(self, found: Mapping[str, Any]) -> None:
        """In one piece, or not at all where nothing can be written."""
        if self.file is None:
            return
        part = self.file.with_suffix(f".{os.getpid()}")
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(self.file)
        except OSError:
            part.unlink(missing_ok=True)


def remembered(digest: str, job: Any, turns: tuple[int, int]) -> Memo:
    """That of a program with this text on the job's machine, made by these versions of code and compilers."""
    key = json.dumps([digest, job.topology, turns, versions(), _own_code()], default=list, sort_keys=True)
    try:
        folder = user_cache("plans", "HOME")
    except RlhfjaxError:
        return Memo(None)
    return Memo(folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json")


@cache
def _own_code() -> str:
    """Of what reads programs, and of the options they are compiled with, which their text does not hold."""
    root = Path(__file__).parents[1]
    files = [*sorted((root / "planning").glob("*.py")), root / "stages" / "compilation.py"]
    names = ("hlo", "hlo_kernels", "hlo_text", "hlo_traffic", "compiler", "topology", "compilation")
    content = b"".join(file.read_bytes() for file in files if file.stem in names)
    return hashlib.sha256(content).hexdigest()
