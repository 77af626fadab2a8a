"""From words of a command line to a plan with remedies, and to the folder of programs that it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.files import write_json
from rlhfjax.planning.assumed import Assumed
from rlhfjax.planning.chips import this_machine
from rlhfjax.planning.plan import Question, planned
from rlhfjax.planning.programs import Limits, memory_of_host
from rlhfjax.planning.shapes import described
from rlhfjax.planning.shipped import COMPILED, PLAN
from rlhfjax.planning.topology import Topology, of_cpu, parsed


def asked(
    run: Run, topology: str | None, devices: int | None, slices: int, *, programs: Path | None, assumed: Assumed,
    say: Callable[[str], None],
) -> Question:  # fmt: skip
    """The question; a recipe whose mesh names no slices is laid over those of the machine."""
    machine = parsed(topology, slices) if topology else of_cpu(devices or 1)
    recipe = run
    run, vocabulary = described(run, say)
    if machine.slices > 1 and run.mesh.slices == 1:
        say(f"mesh.slices: {machine.slices}, as --num-slices says")
        run = run.model_copy(update={"mesh": run.mesh.model_copy(update={"slices": machine.slices})})
    chip = machine.chip if machine.kind != "cpu" else _here(machine)
    kept = None if programs is None else str(programs.absolute() / COMPILED)
    return Question(recipe, run, machine, chip, vocabulary, assumed, kept, Limits(assumed.seconds))


def _here(machine: Topology) -> Any:
    from rlhfjax.training.flops import machine_peak

    return this_machine(machine.devices, machine_peak(), memory_of_host() // machine.devices)


def kept(question: Question, search: bool, programs: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan, with what to change where it does not fit; written beside the programs, where these are kept."""
    from rlhfjax.planning.remedies import remedies

    if programs is not None:
        (programs / COMPILED).mkdir(mode=0o700, parents=True, exist_ok=True)
    plan = planned(question, say)
    if search and not plan["fits"]:
        plan["remedies"] = remedies(question, plan, say)
    if programs is not None:
        write_json(programs / PLAN, plan)
    return plan
