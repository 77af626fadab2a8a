"""A local step that is whole on the disks of all hosts together becomes a state again.

Processes tell each other which regions their files hold. One whose own disk lacks its regions, or has other bits there,
gets them from another's copy, over the devices' own network.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.errors import IntegrityError
from rlhfjax.host import exchange, processes
from rlhfjax.integrity import verifying
from rlhfjax.training.checkpoint import Checkpoints, Restored
from rlhfjax.training.digests import different_leaves
from rlhfjax.training.local.layout import Key, layout_of, leaves_of, part_shape, placed
from rlhfjax.training.local.moving import grouped, moved, on_the_host, pairs_of
from rlhfjax.training.local.steps import LocalSteps

Blocks = Mapping[Key, np.ndarray]


@dataclass(frozen=True)
class Told:
    """What a process says of one of its files: the step, digests of the regions in it, and the layout that it is of."""

    step: int
    holds: Sequence[str]
    layout: str


def restored_newest(
    checkpoints: Checkpoints,
    local: LocalSteps,
    rows: Path,
    models: Mapping[str, Any],
    training: Any,
    before: Callable[[], None] = lambda: None,
) -> tuple[Restored | None, bool]:
    """The newest step that is whole, a local one or a checkpoint (None where there is none), and whether it is local.

    A local one is taken where `rows`, the metrics of the stage, reach as far. `before` is called before one is read.
    Raises as `Checkpoints.restore_newest`.
    """
    found = Found(local, {**models, "training": training})
    if found.whole or checkpoints.latest() is not None:
        before()
    written = int(processes.by_first(lambda: str(_last_step(rows)), "rows"))
    left = [step for step in found.whole if step <= written]
    for step in [step for step in found.whole if step > written]:
        local.report(f"{local.root}: step {step} is left out, since {rows} ends at step {written}")
    while True:
        durable = checkpoints.latest()
        for step in [step for step in left if step > (durable or 0)]:
            left.remove(step)
            if restored := found.restore(step, models):
                local.begin(step, whole=True)
                last = "there is no checkpoint yet" if durable is None else f"the newest checkpoint is step {durable}"
                local.report(f"goes on from the local step {step} in {local.root}; {last}")
                return restored, True
        restored = checkpoints.restore_newest(models, training)
        step = checkpoints.latest() or 0
        if not any(other > step for other in left):
            break
        del restored  # a checkpoint was damaged, and a local step is newer than the one before it
    if newer := [other for other in found.elsewhere if other > step]:
        local.report(f"{local.root}: step {max(newer)} is of {found.layouts}; here are {found.layout.told}")
    if restored is not None:
        local.report(f"goes on from the checkpoint of step {step}; there is no newer local step to go on from")
    local.begin(step, whole=False)
    return restored, False


class Found:
    """The local steps that processes find on their disks; all of them look together."""

    def __init__(self, local: LocalSteps, items: Mapping[str, Any]):
        self._local, self._items, self.layout = local, items, layout_of(leaves_of(items))
        self._files, wrong = local.files()
        own = [[file.facts["step"], file.facts["holds"], file.facts["layout"]] for file in self._files]
        self._told: list[list[Told]] = []
        for place, text in enumerate(exchange.tell_all("local steps", json.dumps([own, wrong]))):
            held, wrong = json.loads(text)
            self._told.append([Told(*one) for one in held])
            self._say(place, wrong)
        steps = {one.step for told in self._told for one in told}
        self.whole = sorted((step for step in steps if all(self._options(step).values())), reverse=True)
        others = [one for told in self._told for one in told if one.layout != self.layout.told]
        self.elsewhere = {one.step for one in others}
        self.layouts = " and ".join(sorted({one.layout for one in others}))

    def _say(self, place: int, wrong: Iterable[str]) -> None:
        for text in wrong:
            self._local.report(f"{text} (process {place})" if processes.count() > 1 else text)

    def _options(self, step: int) -> dict[int, list[tuple[int, int]]]:
        """For each process the files that hold its regions, as process and number; those on its own host first."""
        files = [(place, i, one) for place, told in enumerate(self._told) for i, one in enumerate(told)]
        return {
            process: sorted(
                ((place, i) for place, i, one in files if one.step == step and digest in one.holds),
                key=lambda option: (option[0] != process, option),
            )
            for process, digest in self.layout.digests.items()
        }

    def restore(self, step: int, models: Mapping[str, Any]) -> Restored | None:
        """A step that is whole; None where what is read turns out not to be, which is said."""
        ready = self._ready(step)
        if ready is None:
            return None
        blocks, facts, holders = ready
        own = jax.process_index()
        mine = blocks[own] if holders[own] == own else {}
        lacking = {process: holder for process, holder in holders.items() if holder != process}
        while lacking:
            moves: dict[int, int] = {}  # one of each process at a time
            for process, holder in list(lacking.items()):
                if holder not in moves:
                    moves[holder] = process
                    del lacking[process]
            received = self._moved(moves, blocks)
            mine = received if own in moves.values() else mine
        leaves = {
            name: placed(leaf, [mine[name, start] for start in self.layout.starts(name, own)], self.layout.of(own))
            for name, leaf in self.layout.leaves.items()
        }
        tree = jax.tree.unflatten(jax.tree.structure(self._items), leaves.values())
        if verifying() and (different := different_leaves(tree, facts["digests"])):
            self._local.report(f"{self._local.root}, step {step}: expected {different[0]} as saved, got other bits")
            return None
        return {name: tree[name] for name in models}, tree["training"], facts["meta"] | {"step": step}

    def _ready(self, step: int) -> tuple[dict[int, Blocks], dict[str, Any], dict[int, int]] | None:
        """The regions that this process read, by the process that needs them, facts of the step, and who has whose."""
        options, own = self._options(step), jax.process_index()
        blocks, holders, facts = {}, {}, ""
        while open_ := [process for process in options if process not in holders]:
            if not all(options[process] for process in open_):
                self._local.report(f"{self._local.root}: step {step} is left out; nobody has all of it")
                return None
            tried = {process: options[process].pop(0) for process in open_}
            said: dict[int, str] = {}
            for process, (holder, number) in tried.items():
                if holder != own:
                    continue
                file = self._files[number]
                try:
                    blocks[process], said[process] = file.read(self.layout.keys(process)), ""
                    facts = json.dumps({"digests": file.facts["digests"], "meta": file.facts["meta"]})
                except IntegrityError as error:
                    said[process] = str(error)
            for place, text in enumerate(exchange.tell_all("local step", json.dumps(said))):
                for process, wrong in json.loads(text).items():
                    if wrong:
                        self._say(place, [wrong])
                    else:
                        holders[int(process)] = place
        first = min(holders.values())
        told = exchange.tell_all("facts of a local step", facts if own == first else "")
        return blocks, json.loads(told[first]), holders

    def _moved(self, moves: Mapping[int, int], blocks: Mapping[int, Blocks]) -> Blocks:
        """What this process receives when all regions of some processes go to them from those that have them."""
        own = jax.process_index()
        pairs, to = pairs_of(self.layout, moves), moves.get(own)
        found: dict[Key, np.ndarray] = {}
        for group in grouped(self.layout, self.layout.leaves):
            given = [list(self._given(name, None if to is None else blocks[to], to)) for name in group]
            for name, parts in zip(group, moved(self.layout.line, pairs, given), strict=True):
                shape = part_shape(self.layout.leaves[name])
                for start, part in zip(self.layout.starts(name, own), parts, strict=True):
                    found[name, start] = on_the_host(part).reshape(shape)
        return found

    def _given(self, name: str, blocks: Blocks | None, to: int | None) -> Iterator[jax.Array]:
        """The parts of an array that this process's devices give, of one axis at least; zeros where they give none."""
        leaf = self.layout.leaves[name]
        shape = part_shape(leaf) or (1,)
        starts = self.layout.starts(name, jax.process_index() if to is None else to)
        for device, start in zip(self.layout.of(jax.process_index()), starts, strict=True):
            part = np.zeros(shape, jnp.dtype(leaf.dtype)) if blocks is None else blocks[name, start].reshape(shape)
            yield jax.device_put(part, device)


def _last_step(rows: Path) -> int:
    """The step of the last whole row of metrics; 0 where there is none."""
    try:
        lines = rows.read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
