"""Faults on purpose, so that tests can see what a run does when it is killed, hangs or computes nonsense.

`RLHFJAX_FAULT=KIND@POINT:STEP[:PROCESS]` asks for one (`STEP+`: from there on), and is an error unless
`RLHFJAX_ALLOW_FAULTS=1` allows it; several have commas between them. Without the first variable everything here is a
look at an empty list.
"""

import ctypes
import errno
import os
import signal
import threading
import time
from dataclasses import dataclass

from rlhfjax.errors import ConfigError

_SIGNALS = {name: getattr(signal, name.upper()) for name in ("sigkill", "sigterm", "sigint", "sigstop", "sigsegv")}
_NUMBERS = ("nan", "inf")
KINDS = (*_SIGNALS, "abort", "exception", "hang", "spin", "lock", "lock_gil", "full", "slow", *_NUMBERS)
_held = threading.Lock()
_FOREVER = 3600  # seconds; whoever waits for a hang has a shorter deadline
_SLOW = 5.0  # seconds


class InjectedFault(RuntimeError):
    """What `exception` raises: a bug, as far as anybody can tell."""


@dataclass(frozen=True)
class Fault:
    """`kind` happens when this process (any, where `process` is None) reaches `point` at `step`, or `onwards`."""

    kind: str
    point: str
    step: int
    process: int | None = None
    onwards: bool = False


def read_fault(text: str | None, allowed: bool) -> Fault | None:
    """The fault that a text like `sigkill@save:2:1` asks for.

    Raises ConfigError when it cannot be read, or is not allowed.
    """
    if not text:
        return None
    if not allowed:
        raise ConfigError(
            f"RLHFJAX_FAULT={text} asks for a fault; expected RLHFJAX_ALLOW_FAULTS=1 with it, or neither of them"
        )
    kind, _, place = text.partition("@")
    words = place.split(":")
    onwards = place.removesuffix("+") != place or "+:" in place
    numbers = [word.removeprefix("proc").removesuffix("+") for word in words[1:]]
    if kind not in KINDS or len(words) not in (2, 3) or not all(number.isdigit() for number in numbers):
        raise ConfigError(
            f"RLHFJAX_FAULT: expected KIND@POINT:STEP[:PROCESS] with KIND one of {', '.join(KINDS)}, got {text!r}"
        )
    return Fault(kind, words[0], int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None, onwards)


def read_faults(text: str | None, allowed: bool) -> list[Fault]:
    """Those that a text like `sigterm@ppo:3,slow@ppo:4` asks for. Raises ConfigError as `read_fault`."""
    return [fault for part in (text or "").split(",") if (fault := read_fault(part, allowed))]


_faults = read_faults(os.environ.get("RLHFJAX_FAULT"), os.environ.get("RLHFJAX_ALLOW_FAULTS") == "1")
_spent: set[Fault] = set()


def reach(point: str, step: int) -> None:
    """Called where a fault may be wanted; it happens here when this is the place, and once."""
    for fault in [fault for fault in _faults if fault.kind not in _NUMBERS and _here(fault, point, step)]:
        _faults.remove(fault)
        if mark := os.environ.get("RLHFJAX_FAULT_MARK"):  # the file that gets the time, for those who count from it
            with open(mark, "w", encoding="ascii") as file:
                file.write(str(time.time()))
        _happen(fault, f"{point}:{step}")


def _happen(fault: Fault, where: str) -> None:
    if fault.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.kind])
    elif fault.kind == "abort":
        os.abort()
    elif fault.kind == "hang":
        time.sleep(_FOREVER)
    elif fault.kind == "lock_gil":
        ctypes.PyDLL(None).sleep(_FOREVER)  # a PyDLL keeps the interpreter's lock while it is in C
    elif fault.kind == "spin":
        while True:
            pass
    elif fault.kind == "lock":
        _held.acquire()
        _held.acquire()  # by the one that has it already
    elif fault.kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.kind == "slow":
        time.sleep(_SLOW)
    else:
        raise InjectedFault(f"{fault.kind} at {where}, as RLHFJAX_FAULT asked")


def factor(point: str, step: int) -> float:
    """What numbers at `point` are multiplied with: NaN or infinity when that is the fault that is wanted, else 1.

    Training that goes back and comes to the step again meets the fault no second time.
    """
    for fault in _faults:
        if fault.kind in _NUMBERS and fault not in _spent and _here(fault, point, step):
            if not fault.onwards:
                _spent.add(fault)
            return float(fault.kind)
    return 1.0


def wanted(point: str) -> bool:
    """Whether numbers at `point` are to be multiplied at any step, for programs that must be compiled with that."""
    return any(fault.kind in _NUMBERS and fault.point == point for fault in _faults)


def _here(fault: Fault, point: str, step: int) -> bool:
    if fault.point != point or step < fault.step or (step > fault.step and not fault.onwards):
        return False
    if fault.process is None:
        return True
    import jax

    return jax.process_index() == fault.process
