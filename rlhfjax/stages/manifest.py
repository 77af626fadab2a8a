"""manifest.jsonl: one line an attempt, with all that is needed to know what ran."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhfjax.config import Run, config_hash, resolved
from rlhfjax.environment import flags, package_versions


class Manifest:
    """Appends the attempt's line when it starts and rewrites it with its end when it ends."""

    def __init__(self, run: Run, run_dir: Path):
        self.path = run_dir / "manifest.jsonl"
        self.run = run

    def __enter__(self) -> "Manifest":
        self.line = describe(self.run) | {"attempt": len(self._lines()) + 1, "status": "running", "exit_code": None}
        self._write([*self._lines(), json.dumps(self.line)])
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        status = "finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        code = 0 if kind is None else getattr(error, "exit_code", 130 if kind is KeyboardInterrupt else 1)
        self.line |= {"status": status, "exit_code": code, "ended": _now()}
        if error is not None:
            self.line["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        self._write([*self._lines()[:-1], json.dumps(self.line)])

    def note(self, **facts: Any) -> None:
        """Add what was found out after the start."""
        self.line |= facts
        self._write([*self._lines()[:-1], json.dumps(self.line)])

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def _write(self, lines: list[str]) -> None:
        part = self.path.with_suffix(".part")
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.chmod(part, 0o600)
        part.replace(self.path)


def describe(run: Run) -> dict[str, Any]:
    """Configuration, code, packages, flags, devices and seed of this process."""
    import jax

    return {
        "started": _now(),
        "argv": sys.argv,
        "config": resolved(run),
        "config_hash": config_hash(run),
        "seed": run.seed,
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": package_versions(),
        "lock_hash": _lock_hash(),
        "flags": flags(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "process": [jax.process_index(), jax.process_count()],
    }


def _git() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it, where the package runs from a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def _lock_hash() -> str | None:
    lock = Path(__file__).resolve().parents[2] / "requirements.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
