"""Guards: what a run may not do for long, and what happens when it does.

`judge` and `remember` are functions of a row of metrics and of a memory; `Guard` acts on what they find. The memory is
saved with every checkpoint, so a resumed run judges as an unbroken one does. Rows are judged before a save, so what is
saved has passed.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rlhfjax.config.upkeep import Guards
from rlhfjax.errors import Diverged
from rlhfjax.training.ledger import Taken
from rlhfjax.training.metrics import MetricsWriter, ProgressLine

LOSS = "loss/total"
FILE = "guards.jsonl"
Row = Mapping[str, float]
State = TypeVar("State")


@dataclass(frozen=True)
class Memory:
    """What the guards know of the steps so far.

    `losses` are the last finite ones; `skipped` and `in_a_row` count as in TrainState; `left_out` is the batches that
    rollbacks have passed over, by which the data are ahead of the step; `drawn` the batches of prompts that an
    iteration took beyond its first.
    """

    losses: tuple[float, ...] = ()
    skipped: int = 0
    in_a_row: int = 0
    divergences: int = 0
    rollbacks: int = 0
    left_out: int = 0
    drawn: int = 0

    def saved(self) -> dict[str, Any]:
        """As JSON, for a checkpoint's meta."""
        return asdict(self) | {"losses": list(self.losses)}

    def told(self) -> dict[str, Any]:
        """What a stage says of itself at its end; nothing where nothing happened."""
        facts = {"skipped_updates": self.skipped, "divergences": self.divergences, "rollbacks": self.rollbacks}
        return {name: count for name, count in facts.items() if count}


def memory_of(meta: Mapping[str, Any]) -> Memory:
    """What a checkpoint's meta says; nothing where it is from before there were guards."""
    known: Any = meta.get("guards") or {}
    return Memory(**{**known, "losses": tuple(known.get("losses", ()))})


@dataclass(frozen=True)
class Finding:
    """A value on the wrong side of its bound; `since` is the first step of it."""

    kind: str
    value: float
    bound: float
    since: int

    def __str__(self) -> str:
        return _WRONG[self.kind].format(**asdict(self))


_WRONG = {
    "non_finite": "{value:g} steps in a row without a finite update (guard/skipped_in_a_row), as many as "
    "reliability.guards.non_finite {bound:g}",
    "kl_ceiling": "objective/kl is {value:.4g}, above reliability.guards.kl_ceiling {bound:g}",
    "entropy_floor": "objective/entropy over objective/length is {value:.4g}, below reliability.guards.entropy_floor "
    "{bound:g}",
    "length_at_cap": "1 - objective/eos_rate is {value:.4g}, above reliability.guards.length_at_cap {bound:g}",
    "loss_spike": "loss/total is {value:.4g}, above {bound:.4g} by reliability.guards.loss_spike and the losses before",
}
_REMEDY = {
    "non_finite": "lower optimizer.lr, or look at those rows",
    "kl_ceiling": "raise kl.coef, lower optimizer.lr, or raise the ceiling",
    "entropy_floor": "raise entropy_coef, lower optimizer.lr, or lower the floor",
    "length_at_cap": "raise sampling.max_new_tokens, lower missing_eos.value, or raise the bound",
    "loss_spike": "lower optimizer.lr, look at those rows, or raise the bound",
}
_REWARDS = "rewards failed (objective/reward_failures): what was said of the first says why"


def _remedy(finding: Finding, row: Row) -> str:
    without = finding.kind == "non_finite" and row.get("objective/reward_failures")
    return _REWARDS if without else _REMEDY[finding.kind]


def judge(settings: Guards, memory: Memory, step: int, row: Row) -> list[Finding]:
    """What is wrong with the row of a step; a metric that the stage has not, or that is NaN, is not judged."""
    in_a_row = int(row.get("guard/skipped_in_a_row", 0))
    found = []
    if in_a_row >= settings.non_finite:
        found.append(Finding("non_finite", in_a_row, settings.non_finite, step - in_a_row + 1))
    ceilings = (
        ("kl_ceiling", row.get("objective/kl", math.nan), settings.kl_ceiling),
        ("length_at_cap", 1.0 - row.get("objective/eos_rate", math.nan), settings.length_at_cap),
        ("loss_spike", row.get(LOSS, math.nan), _highest_loss(settings, memory)),
    )
    found += [
        Finding(kind, value, bound, step) for kind, value, bound in ceilings if bound is not None and value > bound
    ]
    entropy = row.get("objective/entropy", math.nan) / max(row.get("objective/length", math.nan), 1.0)
    if settings.entropy_floor is not None and entropy < settings.entropy_floor:
        found.append(Finding("entropy_floor", entropy, settings.entropy_floor, step))
    return found


def _highest_loss(settings: Guards, memory: Memory) -> float | None:
    """Mean + loss_spike standard deviations of the window; None while it is not full."""
    if settings.loss_spike is None or len(memory.losses) < settings.spike_window:
        return None
    window = np.asarray(memory.losses[-settings.spike_window :], np.float64)
    return float(window.mean() + settings.loss_spike * window.std())


def remember(settings: Guards, memory: Memory, row: Row, found: Iterable[Finding] = ()) -> Memory:
    """The memory after a row. A loss that is not finite says nothing about what losses are like."""
    losses = memory.losses
    if settings.loss_spike is not None and math.isfinite(row.get(LOSS, math.nan)):
        losses = (*losses, row[LOSS])[-settings.spike_window :]
    return replace(
        memory,
        losses=losses,
        skipped=memory.skipped + int(row.get("guard/skipped_updates", 0)),
        in_a_row=int(row.get("guard/skipped_in_a_row", 0)),
        divergences=memory.divergences + any(True for _ in found),
    )


def good_before(steps: Iterable[int], since: int) -> int | None:
    """Where to roll back to: the newest checkpoint whose next step was still good.

    What a step measures is the state that the step before it left, so a checkpoint taken right before `since` holds
    what was found to be wrong. Where there is no other, the oldest; None where there is none at all.
    """
    known = sorted(steps)
    return max((step for step in known if step + 1 < since), default=known[0] if known else None)


class RollBack(Exception):
    """Leaves a loop towards `with_rollbacks`: at `step` something was found that began `since`."""

    def __init__(self, step: int, since: int):
        super().__init__(step, since)
        self.step, self.since = step, since


def with_rollbacks(train: Callable[[State], State], state: State, back: Callable[[RollBack], State]) -> State:
    """`train(state)`, and again from `back(…)` as often as the guards want it."""
    while True:
        try:
            return train(state)
        except RollBack as wanted:
            rollback = wanted.with_traceback(None)  # whose frames hold the state that is left behind
        state = back(rollback)


class Guard:
    """Judges the rows of a stage, notes in DIRECTORY/guards.jsonl what it finds, and stops, rolls back or warns.

    The file holds numbers of rows and metrics, no text.
    """

    def __init__(self, settings: Guards, directory: Path, stage: str, memory: Memory | None = None):
        self.settings, self.stage, self.memory = settings, stage, memory or Memory()
        self._path, self._warned = directory / FILE, set()

    def written(
        self,
        writer: MetricsWriter,
        say: Callable[[str], None],
        step: int,
        metrics: Mapping[str, Any],
        taken: Taken | None,
    ) -> dict[str, float]:
        """Write the row of a step, which read what was `taken`, then act on what is wrong with it.

        Raises Diverged, or RollBack.
        """
        row = {name: float(np.asarray(value)) for name, value in metrics.items()}
        found = judge(self.settings, self.memory, step, row)
        self.memory = remember(self.settings, self.memory, row, found)
        counts = {"guard/divergences": self.memory.divergences, "guard/rollbacks": self.memory.rollbacks}
        shown = writer.write(step, row | counts, taken)
        if found or row.get("guard/skipped_updates"):
            self._act(say, step, row, found, taken.places if taken else [])
        return shown

    def _act(self, say: Callable[[str], None], step: int, row: Row, found: list[Finding], ids: list[int]) -> None:
        if skipped := int(row.get("guard/skipped_updates", 0)):
            self._note(step, "skipped", ids, {name: v for name, v in row.items() if not math.isfinite(v)})
            self._warn(say, "skipped", f"{self.stage}: step {step} skipped {skipped} updates that were not finite")
        for finding in found:
            self._note(step, finding.kind, ids, {"value": finding.value, "bound": finding.bound})
            if self.settings.on_divergence == "continue":
                self._warn(say, finding.kind, f"{self.stage}: step {step}: {finding}")
        if not found or self.settings.on_divergence == "continue":
            return
        if self.settings.on_divergence == "rollback" and self.memory.rollbacks < self.settings.rollbacks:
            say(f"{self.stage}: step {step}: {found[0]}; rolling back")
            raise RollBack(step, min(finding.since for finding in found))
        after = f" after {self.memory.rollbacks} rollbacks" if self.memory.rollbacks else ""
        raise Diverged(
            f"{self.stage} diverged at step {step}{after}: {found[0]}. The checkpoints before it are kept, row numbers "
            f"are in {self._path}; {_remedy(found[0], row)}"
        )

    def rolled_back(self, rollback: RollBack, to: int, memory: Memory) -> None:
        """Go on from step `to`, at which the guards knew `memory`, with the data after those of `rollback.step`."""
        self.memory = replace(
            memory,
            divergences=self.memory.divergences,
            rollbacks=self.memory.rollbacks + 1,
            left_out=self.memory.left_out + rollback.step - to,
            drawn=self.memory.drawn,
        )
        self._note(rollback.step, "rolled_back", [], {"to": to, "left_out": self.memory.left_out})

    def _warn(self, say: Callable[[str], None], kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            say(f"{text}; more of this is only counted (guard/* in metrics.jsonl, {FILE})")

    def _note(self, step: int, kind: str, rows: list[int], values: Row) -> None:
        if jax.process_index():
            return
        numbers = {name: v if math.isfinite(v) else str(v) for name, v in values.items()}  # JSON has no NaN
        line = json.dumps({"step": step, "kind": kind, "values": numbers, "rows": rows}) + "\n"
        with open(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write(line)


def write_row(
    guard: Guard | None,
    writer: MetricsWriter,
    progress: ProgressLine,
    step: int,
    row: Mapping[str, Any],
    taken: Taken | None,
) -> dict[str, float]:
    """Write the metrics of a step, past the guard where there is one; the progress line ends where the loop does."""
    if guard is None:
        return writer.write(step, row, taken)
    try:
        return guard.written(writer, progress.note, step, row, taken)
    except (Diverged, RollBack):
        progress.close()
        raise
