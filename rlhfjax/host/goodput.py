"""What became of each second of a run, over all its attempts: the arithmetic of `RUN/time.jsonl`. Knows no jax.

A line says how many seconds since the line before were spent on what, and how many steps of the stage are done now:

    {"at":1764535562.1,"is":"start","attempt":1}
    {"at":1764535571.9,"stage":"sft","done":0,"s":{"starting":7.1,"compile":2.7}}
    {"at":1764535573.0,"stage":"sft","done":9,"s":{"productive":1.1}}
    {"at":1764535573.4,"is":"end","code":42,"s":{"save":0.4}}

Work is productive once its step is done, unless that step had been done before: then it is lost to what made the run
go back. So is work on a step that was never done, and the time from an attempt's last line to the next start.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "time.jsonl"
PREEMPTION, FAILURE = "lost to preemption", "lost to failure"
PRODUCTIVE, STARTING = "productive", "starting up"
KINDS = (PRODUCTIVE, "compile", "restore", "save", "waiting", STARTING, PREEMPTION, FAILURE)
_PREEMPTED = (42, 130, 143)  # saved and asked to stop; by Ctrl-C; by a second SIGTERM


@dataclass
class Attempt:
    """One start of the run, all times in seconds since 1970.

    `last` is when it ended or left its last line, `code` its exit code, None of one that was killed, `new` when the
    first work began that no attempt before it had done.
    """

    began: float
    last: float
    code: int | None = None
    new: float | None = None

    @property
    def lost_to(self) -> str | None:
        """What to blame for the time until the next start; None after a good end, when nothing was left to do."""
        return None if self.code == 0 else PREEMPTION if self.code in _PREEMPTED else FAILURE


@dataclass
class _Stage:
    """How far a stage is, and which steps were done before: `again` are (up to, lost to), the lowest last."""

    done: int = 0
    again: list[tuple[int, str]] = field(default_factory=list)

    def back_to(self, step: int, lost_to: str) -> None:
        if step < self.done:
            self.again = [each for each in self.again if each[0] > self.done]
            self.again.append((self.done, lost_to))
        self.forward_to(step)

    def forward_to(self, step: int) -> None:
        self.done = step
        while self.again and self.again[-1][0] <= step:
            self.again.pop()

    @property
    def lost_to(self) -> str | None:
        """What the next step is lost to, being done again; None where it is new."""
        return self.again[-1][1] if self.again else None


class Account:
    """Adds up the lines of a ledger, in their order."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()):
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.attempts: list[Attempt] = []
        self.steps = {PRODUCTIVE: 0, PREEMPTION: 0, FAILURE: 0}
        self._stages: dict[str, _Stage] = {}
        self._stage, self._resumed, self._pending = "", set[str](), 0.0  # work on a step that is not done yet
        for line in lines:
            self.add(line)

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last line, without those after a good end in which nothing ran."""
        return sum(self.seconds.values()) + self._pending

    @property
    def goodput(self) -> float:
        """The productive share of the wall time, with work that is under way."""
        now = self._pending if self._lost_to is None else 0.0
        return (self.seconds[PRODUCTIVE] + now) / self.wall if self.wall else 0.0

    @property
    def boundary(self) -> int | None:
        """The step of the stage up to which steps are done again; None where the next one is new."""
        again = self._stages[self._stage].again if self._stage in self._stages else []
        return again[-1][0] if again else None

    @property
    def _lost_to(self) -> str | None:
        return self._stages[self._stage].lost_to if self._stage in self._stages else None

    def add(self, line: Mapping[str, Any]) -> None:
        """The next line of the ledger."""
        at = float(line["at"])
        if line.get("is") == "start":
            self._start(at, line.get("redo", ()))
            return
        attempt = self.attempts[-1]
        for kind, seconds in line.get("s", {}).items():
            if kind == PRODUCTIVE:
                self._pending += seconds
                if attempt.new is None and self._lost_to is None and self._pending:
                    attempt.new = attempt.last
            else:
                self.seconds[kind] += seconds
        attempt.last = max(at, attempt.last)
        if "stage" in line:
            self._moved(line["stage"], line.get("done"))
        if line.get("is") == "end":
            attempt.code = int(line["code"])
            self._commit(attempt.lost_to)

    def _start(self, at: float, redo: Iterable[str]) -> None:
        if self.attempts:
            before = self.attempts[-1]
            self._commit(before.lost_to)
            if before.lost_to:
                self.seconds[before.lost_to] += max(at - before.last, 0.0)
            at = max(at, before.last)  # a clock that was set back
        for stage in redo:
            self._stages.pop(stage, None)
        self.attempts.append(Attempt(at, at))
        self._stage, self._resumed = "", set()

    def _moved(self, name: str, done: int | None) -> None:
        if name != self._stage:
            self._commit(self._lost_to)  # a stage that another one follows is done
            self._stage = name
        if done is None:
            return
        stage = self._stages.setdefault(name, _Stage())
        before = self.attempts[-2].lost_to if len(self.attempts) > 1 else None
        if name not in self._resumed:
            self._resumed.add(name)
            stage.back_to(done, before or FAILURE)
        elif done < stage.done:  # a guard went back
            self._commit(FAILURE)
            stage.back_to(done, FAILURE)
        elif done > stage.done:
            self.steps[stage.lost_to or PRODUCTIVE] += done - stage.done
            self._commit(stage.lost_to)
            stage.forward_to(done)

    def _commit(self, lost_to: str | None) -> None:
        self.seconds[lost_to or PRODUCTIVE] += self._pending
        self._pending = 0.0

    def to_recover(self) -> list[float | None]:
        """Of each restart the seconds from the end of the attempt before to the first new work; None: none was done."""
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        return [None if now.new is None else now.new - before.last for before, now in pairs]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; none where there is no file. What a full disk or a kill tore is passed over."""
    found = []
    for text in path.read_text("utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("at"), int | float) and (found or line.get("is") == "start"):
            found.append(line)
    return found


def account_of(run_dir: Path) -> Account | None:
    """The account of a run; None where it kept no ledger."""
    lines = read_lines(run_dir / FILE)
    return Account(lines) if lines else None
