"""Models that are named as the Hugging Face hub names them: what of them is on this machine. Nothing is downloaded."""

import os
import re
from pathlib import Path

from rlhfjax.errors import ConfigError
from rlhfjax.places import expanded

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_hub_name(source: str) -> bool:
    """Whether it is an OWNER/NAME, and no path that is there."""
    return bool(_NAME.fullmatch(source)) and not os.path.lexists(source) and ".." not in source


def cache_directory() -> Path:
    """Where the hub's own tools keep what they downloaded, as the environment says."""
    if where := os.environ.get("HF_HUB_CACHE"):
        return expanded(where)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return expanded(home) / "hub"


def cached_snapshot(name: str) -> Path:
    """The directory of OWNER/NAME in the hub's cache: that of `main`, or the only one.

    Raises ConfigError that says what to type where there is none.
    """
    folder = cache_directory() / f"models--{name.replace('/', '--')}"
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size < 256:
        named = main.read_text(encoding="utf-8", errors="replace").strip()
        snapshots = [path for path in snapshots if path.name == named] or snapshots
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        raise ConfigError(f"{name}: expected one snapshot in {folder}, got {len(snapshots)}; name the directory of one")
    own = name.partition("/")[2]
    raise ConfigError(
        f"{name}: expected a directory, or this model in {cache_directory()}, got neither; rlhfjax downloads nothing: "
        f"hf download {name} --local-dir {own}, and then rlhfjax import {own} DST"
    )


def blobs_of(directory: Path) -> Path | None:
    """The folder that files of a snapshot of the hub's cache are links into; None for any other directory."""
    snapshots, model = directory.parent, directory.parent.parent
    inside = snapshots.name == "snapshots" and model.name.startswith("models--")
    return model / "blobs" if inside else None
