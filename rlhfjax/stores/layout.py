"""How a run lies in a store: which objects are a step, parts of a file that grows, or files.

A directory of a run lies there under the same names, with three exceptions, for what a store cannot do:

- There is no renaming, so a step is whole when its manifest is there, which is written after all else of it. One that
  was found damaged has an object DAMAGED in it.
- Nothing can be appended to an object, so a file that grows is kept in parts, `metrics.jsonl.parts/OFFSET`, until its
  stage is complete, or for one of the run until the launch ends; then it is one object. A part counts where those
  before it end at its offset, and all of them where they hold more than the object.
- `.lock/` holds the lock.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MANIFEST, DAMAGED, COMPLETE, STATE = "MANIFEST.sha256.json", "DAMAGED", "complete.json", ".store"
_STEP = re.compile(r"^((?:.*/)?checkpoints/\d+)/(.+)$", re.DOTALL)
_PART = re.compile(r"^(.+)\.parts/(\d+)$", re.DOTALL)
_PASSING = (".part", ".lock", ".replaced", ".removed", ".damaged", ".orbax-checkpoint-tmp")
_LEFT_HERE = {".lock", STATE, "profile"}  # of this machine alone


@dataclass
class Contents:
    """Objects of a store, sorted out: steps by their folder, each with its files; parts by file and offset; files."""

    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> "Contents":
        """What a listing holds; the lock is left out."""
        found = cls()
        for key, size in sizes.items():
            if step := _STEP.match(key):
                found.steps.setdefault(step[1], {})[step[2]] = size
            elif part := _PART.match(key):
                found.parts.setdefault(part[1], {})[int(part[2])] = key
            elif not key.startswith(".lock/"):
                found.files[key] = size
        return found

    def whole(self) -> dict[str, dict[str, int]]:
        """The steps that count."""
        return {step: held for step, held in self.steps.items() if MANIFEST in held and DAMAGED not in held}


def is_step(folder: str) -> bool:
    """Whether a folder is named as a step is."""
    return _STEP.match(f"{folder}/x") is not None


def grows(key: str) -> bool:
    """Whether rows are appended to this file while a stage trains. The manifest of the run is rewritten."""
    name = PurePosixPath(key).name
    return (name.endswith(".jsonl") and key != "manifest.jsonl") or ".tfevents." in name


def part_key(key: str, offset: int) -> str:
    return f"{key}.parts/{offset:015d}"


def local_steps(root: Path) -> Iterator[Path]:
    """Step directories below a directory, whole or not."""
    for folder in sorted(root.rglob("checkpoints")):
        yield from sorted(path for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def local_files(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Keys and paths of files below a folder that go to the store one by one: none of steps, none in making."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        key = path.relative_to(root).as_posix()
        if path.name in _LEFT_HERE or any(ending in path.name for ending in _PASSING) or is_step(key):
            continue
        if path.is_dir():
            yield from local_files(root, path)
        elif path.is_file() and (path.stat().st_size or grows(key)):  # stacks of a run that never hung are empty
            yield key, path
