"""Agreement: the settings that all processes of a run must share before one of them begins."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhfjax.config import Run, resolved
from rlhfjax.host.environment import package_versions
from rlhfjax.runs.code import package_digests


def facts_of(run: Run, run_dir: Path, only: str | None, start_from: str | None) -> dict[str, str]:
    """Configuration by key, what was asked for, versions of packages, and the digest of the source of this package."""
    asked = {"--only": str(only), "--from": str(start_from), "--run-dir": str(run_dir)}
    configuration = {f"configuration {key}": repr(value) for key, value in _leaves(resolved(run))}
    versions = {f"version of {name}": version for name, version in package_versions().items()}
    return asked | configuration | versions | {"code": package_digests()["sha256"][:12]}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, part in tree.items():
            yield from _leaves(part, f"{prefix}{name}.")
    else:
        yield prefix.rstrip("."), tree
