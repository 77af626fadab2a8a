"""What to change where a recipe does not fit: a small search, each proposal planned like the recipe itself.

What changes no result comes first (parts of a batch, recomputation, the mesh, what lies on hosts), the optimizer last.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.meshes import meshes_that_fit
from rlhfjax.config.recipe import FACTS, section_of
from rlhfjax.errors import RlhfjaxError
from rlhfjax.planning.changes import Overrides, changed_by
from rlhfjax.planning.plan import Question, planned
from rlhfjax.planning.table import duration, gib

SHOWN, TRIED = 3, 12
_MESHES = 4


def remedies(question: Question, plan: Mapping[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The best of the changes that make everything fit, as overrides; the quickest first."""
    failing = [name for name, step in plan["steps"].items() if not step["fits"]]
    found: list[dict[str, Any]] = []
    tried = 0
    for overrides in _candidates(question, failing):
        if tried == TRIED or len(found) == SHOWN or not failing:  # of hosts, nothing here is smaller
            break
        try:
            changed = question.on(changed_by(question.run, overrides))
            tried += 1
            say(f"trying {' '.join(overrides)}")
            if not planned(changed, say, failing)["fits"]:
                continue
            whole = planned(changed, say)
        except RlhfjaxError as error:
            say(f"  {error}")
            continue
        if whole["fits"]:
            found.append(_proposal(overrides, whole, failing))
    return sorted(found, key=lambda one: one["seconds"])


def _proposal(overrides: Overrides, whole: Mapping[str, Any], failing: list[str]) -> dict[str, Any]:
    own = [whole["steps"][name] for name in failing if name in whole["steps"]]
    seconds, peak = sum(step["seconds"]["expected"] for step in own), max(step["peak"] for step in own)
    said = f"{gib(peak)} a device, {duration(seconds)} for {', '.join(failing)}"
    return {"overrides": list(overrides), "seconds": seconds, "peak": peak, "said": said}


def _candidates(question: Question, failing: list[str]) -> Iterator[Overrides]:
    """Sets of overrides, the smallest changes first."""
    run, stages = question.run, list(dict.fromkeys(name.partition("/")[0] for name in failing))
    micro = tuple(itertools.chain.from_iterable(_micro(run, stage, 1) for stage in stages))
    smaller = tuple(itertools.chain.from_iterable(_micro(run, stage, 2) for stage in stages))
    remat = ("model.remat=full",) if run.model.remat not in ("full", "offload") else ()
    offload = ("mesh.offload=all",) if run.mesh.offload != "all" and question.chip.platform != "cpu" else ()
    meshes = [
        tuple(f"mesh.{axis}={size}" for axis, size in sizes.items())
        for sizes in itertools.islice(meshes_that_fit(run, question.machine.devices), _MESHES)
    ]
    singles = [part for part in (micro, remat, offload) if part]
    yield from singles
    yield from (one + two for one, two in itertools.combinations(singles, 2))
    yield from meshes
    if smaller:
        yield smaller + remat + offload
    yield from (mesh + micro + remat + offload for mesh in meshes)
    for stage, kind in itertools.product(stages, ("adamw_bf16", "adafactor")):
        if not FACTS[stage].measures:
            yield (f"stages.{stage}.optimizer.kind={kind}", *micro, *remat, *offload)


def _micro(run: Run, stage: str, halvings: int) -> Overrides:
    """Parts of the batch of a stage that are so many times half as large."""
    batch = section_of(run, stage).batch
    whole = getattr(batch, "minibatch", None) or batch.size
    size = (getattr(batch, "micro", None) or whole) // 2**halvings
    axes = run.mesh.of(stage).axes
    rows = abs(axes["fsdp"] * axes["expert"] * max(axes["data"], 1))
    if FACTS[stage].measures or size < 1 or whole % size or size % rows:
        return ()
    return (f"stages.{stage}.batch.micro={size}",)
