"""A plan as a contract: its programs are found compiled, and what runs is compared with what it says.

A run takes the plan that `rlhfjax plan --programs DIR` left. Programs are known by the digest of what they are lowered
to, which is that of the plan where configuration, code, versions and devices are; jax's own cache, in DIR, holds what
the compiler made of them. One that is not among them is compiled, and it is said why.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax

from rlhfjax.training.expected import Expected

_HIT = "/jax/compilation_cache/cache_hits"
# The metrics of programs that a step waits for.
_OFFLINE = {"step": "timing/step_s"}
_ONLINE = {name: f"timing/{name}_s" for name in ("reshard", "rollout", "score", "estimate", "update")}
_thread = threading.local()


@dataclass
class Contract:
    """What a plan says, and the `directory` of its programs. `apart` is how this run differs from it, a line each."""

    steps: Mapping[str, Mapping[str, Any]]
    apart: tuple[str, ...] = ()
    directory: str = ""
    loaded: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)

    def recognised(self, lowered: Any) -> str | None:
        """The name of a program in the plan; None of one that it lacks."""
        digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
        return next((name for name, step in self.steps.items() if step.get("digest") == digest), None)

    def note(self, name: str | None, what: str, found: bool) -> None:
        """A program was made: `found` compiled, or not."""
        (self.loaded if found else self.compiled).append(name or what)

    def expected(self, stage: str, online: bool) -> Expected:
        """What the plan says of the steps of a stage."""
        own = {name.partition("/")[2]: step for name, step in self.steps.items() if name.startswith(f"{stage}/")}
        units = _ONLINE if online else _OFFLINE
        seconds = {units[name]: step["seconds"]["expected"] for name, step in own.items() if name in units}
        return Expected(seconds, max((step.get("peak", 0) for step in own.values()), default=0))

    def facts(self) -> dict[str, Any]:
        """For the manifest: the planned seconds of each stage's units, and what became of the programs."""
        stages = dict.fromkeys(name.partition("/")[0] for name in self.steps)
        seconds = {stage: dict(self.expected(stage, f"{stage}/rollout" in self.steps).seconds) for stage in stages}
        told = {"seconds": {stage: units for stage, units in seconds.items() if units}}
        return told | {"loaded": self.loaded, "compiled": self.compiled, "apart": list(self.apart)}

    def said(self) -> str:
        """What became of the programs so far, and why some had to be compiled."""
        text = f"programs of the plan: {len(self.loaded)} loaded, {len(self.compiled)} compiled"
        if not self.compiled:
            return text
        why = "; ".join(self.apart) or "the compiler here is not the one of the plan, or another program is asked for"
        return f"{text} ({', '.join(self.compiled)}): {why}"


_current: ContextVar[Contract | None] = ContextVar("contract", default=None)


@contextmanager
def under(contract: Contract | None) -> Iterator[None]:
    """Inside, programs are looked for in the plan."""
    if contract is not None:
        _listening()
    token = _current.set(contract)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Contract | None:
    """That of the `under` around it."""
    return _current.get()


@cache
def _listening() -> None:
    """jax tells of what its cache had; a thread compiles one program at a time."""

    def heard(event: str, **_: Any) -> None:
        if event == _HIT:
            _thread.hits = hits() + 1

    jax.monitoring.register_event_listener(heard)


def hits() -> int:
    """How many programs this thread has found compiled."""
    return getattr(_thread, "hits", 0)
