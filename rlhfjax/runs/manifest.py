"""manifest.jsonl: one line per attempt, with all that is needed to know what ran, and to run it again."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfjax.config import Run, config_hash, resolved
from rlhfjax.errors import Stopped
from rlhfjax.host.environment import flags, machine, needed_versions, settings
from rlhfjax.integrity import sync
from rlhfjax.plain_json import dumps
from rlhfjax.runs.code import commit, lock_digest, package_digests
from rlhfjax.stages.chat_settings import date_of, facts_of_chat

MANIFEST = "manifest.jsonl"


class Manifest:
    """Appends the attempt's line when it starts and rewrites it with its end when it ends.

    The file is replaced in one piece each time, so that it is whole whenever a run is killed; the line of a run that
    was killed keeps the status `running`. `sources` says where each key of the configuration was set. Where `writes`
    is false, as in all processes of a launch but the first, nothing is written. `at_end` adds what is known then.
    `date` is what chat templates write, where it is not that of the run's configuration or of its first start.
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        sources: Mapping[str, str] | None = None,
        writes: bool = True,
        at_end: Callable[[], Mapping[str, Any]] = dict,
        date: datetime.date | None = None,
    ):
        self.path, self.run = run_dir / MANIFEST, run
        self._sources, self._writes, self._at_end, self._date = sources, writes, at_end, date

    def __enter__(self) -> "Manifest":
        self.before = read_attempts(self.path.parent)
        self.line = describe(self.run) | {"config_sources": dict(self._sources or {})}
        self.line |= {"attempt": len(self.before) + 1, "stages": [], "status": "running", "exit_code": None}
        self.line |= {"chat": facts_of_chat(self.run, self._date or date_of(self.run, self.before))}
        self._write()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        status, code = ended_as(error)
        self.line |= {"status": status, "exit_code": code, "ended": now()} | dict(self._at_end())
        if error is not None:
            self.line["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        self._write()

    def leave(self, code: int) -> None:
        """The process ends now, with nobody left to raise anything."""
        self.note(status="preempted" if code == Stopped.exit_code else "interrupted", exit_code=code, ended=now())

    def hung(self, why: str) -> None:
        """The process ends now, because one of those of the run does not go on."""
        self.note(status="hung", exit_code=Stopped.exit_code, ended=now(), error=why)

    @property
    def date(self) -> datetime.date:
        """What chat templates write in this run; of several processes, as the first has written it."""
        written = read_attempts(self.path.parent) or [self.line]
        return datetime.date.fromisoformat(written[-1]["chat"]["date"])

    def note(self, **facts: Any) -> None:
        """Add what was found out after the start."""
        self.line |= facts
        self._write()

    def began(self, stage: str, parents: Mapping[str, Any]) -> None:
        """Note that a stage starts, and the models of earlier stages that it starts from."""
        self.note(
            stages=[*self.line["stages"], stage],
            lineage=self.line.get("lineage", {}) | ({stage: dict(parents)} if parents else {}),
        )

    def _write(self) -> None:
        if not self._writes:
            return
        part = self.path.with_suffix(".part")
        text = "".join(dumps(line, ensure_ascii=True) + "\n" for line in [*self.before, self.line])
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        sync(self.path.parent)


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's manifest, oldest first; none where there is no manifest."""
    path = run_dir / MANIFEST
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def ended_as(error: BaseException | None) -> tuple[str, int]:
    """Status and exit code of an attempt that ended with `error`, None being a good end.

    Errors say their status themselves where it is not `failed`, as `preempted` or `diverged`.
    """
    if error is None:
        return "finished", 0
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, SystemExit):
        return "failed", error.code if isinstance(error.code, int) else 1
    return getattr(error, "status", "failed"), getattr(error, "exit_code", 1)


def describe(run: Run) -> dict[str, Any]:
    """Configuration, code, packages, flags, machine, devices and seed of this process. Starts the devices."""
    import jax

    devices = jax.devices()
    return {
        "started": now(),
        "argv": sys.argv,
        "directory": os.getcwd(),
        "config": resolved(run),
        "config_hash": config_hash(run),
        "seed": run.seed,
        "determinism": run.reliability.determinism,
        "git": commit(),
        "code": package_digests(),
        "python": platform.python_version(),
        "machine": machine(),
        "packages": needed_versions(),
        "lock_hash": lock_digest(),
        "flags": flags(),
        "settings": settings(),
        "backend": jax.default_backend(),
        "platform_version": devices[0].client.platform_version,
        "devices": [str(device.device_kind) for device in devices],
        "process": [jax.process_index(), jax.process_count()],
    }


def other_layout(before: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> str | None:
    """How devices, processes, mesh or sizes differ from those of the attempt that is continued, None if not at all.

    Reductions over other devices, and programs of other sizes, add in another order: what follows is equal within
    rounding only.
    """
    if not before or now["resumed_from"]["stage"] == "tokenizer":
        return None
    last, stage = before[-1], now["resumed_from"]["stage"]
    names = {"devices": "devices", "process": "processes", "mesh": "mesh"}
    last, now = ({**line, **_mesh_of(line, stage)} for line in (last, now))
    shown = {name: (_layout(last.get(name)), _layout(now.get(name))) for name in names if name in last}
    layout = [f"{names[name]} {old} -> {new}" for name, (old, new) in shown.items() if old != new]
    then, here = last.get("target", {}), now.get("target", {})
    sizes = [f"{name} {then[name]} -> {here[name]}" for name in here if name in then and then[name] != here[name]]
    texts = [("on another layout", layout), ("with other sizes", sizes)]
    return ", ".join(f"{text} ({', '.join(changes)})" for text, changes in texts if changes) or None


def _mesh_of(line: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The mesh of a stage that has its own, in place of the recipe's."""
    return {"mesh": line["meshes"][stage]} if stage in line.get("meshes", {}) else {}


def _layout(value: Any) -> str:
    """Devices by kind, processes by count, a mesh by its axes longer than 1."""
    if isinstance(value, dict):
        return " x ".join(f"{axis} {size}" for axis, size in value["shape"].items() if size > 1) or "1"
    if value and isinstance(value[0], int):
        return str(value[1])
    return ", ".join(f"{value.count(kind)} {kind}" for kind in sorted(set(value)))


def now() -> str:
    """The time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
