"""A plan: every program of a recipe on a machine, whether all fit, how long each and all take, and what that costs."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhfjax.config import Run, config_hash, resolved
from rlhfjax.config.recipe import FACTS, TOKENIZER, section_of, stages_of
from rlhfjax.config.schema import RankedBatch
from rlhfjax.errors import ConfigError
from rlhfjax.planning.assumed import Assumed
from rlhfjax.planning.chips import GIB, Chip
from rlhfjax.planning.compiler import Job
from rlhfjax.planning.programs import Answers, Limits, compiled
from rlhfjax.planning.repairs import arithmetic, repairs, wastes
from rlhfjax.planning.times import Seconds, reckoned_by_compiler, seconds_of
from rlhfjax.planning.topology import Topology
from rlhfjax.planning.versions import versions

VERSION = 1
STAGING = 5e9  # bytes/s from the devices of a host to its memory, while training waits
PROCESS = 4 * 10**9  # bytes of a host's memory that Python, jax and batches take
SLOW = 0.2  # a share of the peak below which a step of training is called slow


@dataclass(frozen=True)
class Question:
    """What is to be planned: a recipe on a machine, and what is assumed.

    `run` is the `recipe` as it can be built here, where that names a checkpoint that is elsewhere. Compiled programs
    are kept in `programs`.
    """

    recipe: Run
    run: Run
    machine: Topology
    chip: Chip
    vocabulary: Mapping[str, Any]
    assumed: Assumed
    programs: str | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def job(self) -> Job:
        where = {"kind": self.machine.kind, "sizes": self.machine.sizes, "slices": self.machine.slices}
        return Job(resolved(self.run), where, dict(self.vocabulary), self.assumed.longest, self.programs)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the shape of `run` stands for."""
        return None if self.run.model.checkpoint else self.recipe.model.checkpoint

    def on(self, run: Run) -> "Question":
        """The same of a changed recipe; programs are not kept."""
        return replace(self, run=run, programs=None)


def planned(question: Question, say: Callable[[str], None], only: Iterable[str] | None = None) -> dict[str, Any]:
    """The plan, as plain data. Raises ConfigError for what the arithmetic of the configuration refuses.

    `only` names programs, as `ppo/update`: what is found of them is the same, and the whole is not said.
    """
    run, machine = question.run, question.machine
    refuse(question)
    stages = [stage for stage in stages_of(run) if stage != TOKENIZER]
    held, found = compiled(question.job, stages, question.limits, say, only)
    steps = {name: _step(question, name, answer) for name, answer in found.items()}
    reasons = [*_not_built(held), *(step["reason"] for step in steps.values() if not step["fits"])]
    plan = {
        "version": VERSION,
        "name": run.name,
        "config_hash": config_hash(question.recipe),
        "config": resolved(question.recipe),
        "topology": machine.name,
        "devices": machine.devices,
        "hosts": machine.hosts,
        "chip": {"name": question.chip.name, "memory": question.chip.memory, "flops": question.chip.flops},
        "versions": versions(),
        "fits": not reasons,
        "reasons": reasons,
        "warnings": [*wastes(run, machine.devices), *_warnings(run, steps)],
        "remedies": [],
        "steps": steps,
    }
    if only is None:
        plan |= _whole(question, held, steps)
        reasons += _of_hosts(plan["host_memory"])
        plan["fits"] = not reasons
    return plan


def refuse(question: Question) -> None:
    """Raise ConfigError, with changes that would do, for what the arithmetic of the recipe does not allow."""
    run, machine = question.run, question.machine
    try:
        arithmetic(run, machine.devices, question.checkpoint)
        if run.mesh.slices != machine.slices:
            raise ConfigError(f"mesh.slices: expected {machine.slices}, as {machine.name} has, got {run.mesh.slices}")
    except ConfigError as error:
        found = repairs(run, machine.devices, machine.slices, question.checkpoint)
        changes = "".join(f"\n  change: {' '.join(overrides)}" for overrides in found)
        raise ConfigError(f"{error}{changes}") from None


def _of_hosts(memory: Mapping[str, Any]) -> list[str]:
    if memory["fits"]:
        return []
    needs, has = memory["bytes"] / GIB, memory["of"] / GIB
    return [
        f"a host needs {needs:.1f} GiB of its memory for processes, saves and what mesh.offload puts there, and has "
        f"{has:.1f}; offload less, or take more hosts"
    ]


def _not_built(held: Answers) -> list[str]:
    return [f"{stage}: {answer['said']}" for stage, answer in held.items() if "failed" in answer]


def _step(question: Question, name: str, answer: dict[str, Any]) -> dict[str, Any]:
    chip, machine = question.chip, question.machine
    if "failed" in answer:
        reason = f"{name}: {answer['said']}"
        if answer["failed"] == "memory":
            wants, has = answer["wants"] / GIB, chip.memory / GIB
            reason = f"{name} wants {wants:.1f} GiB of a device, which has {has:.1f}"
            return {"fits": False, "reason": reason, "peak": answer["wants"], "of": chip.memory, "said": answer["said"]}
        return {"fits": False, "reason": reason, "said": answer["said"]}
    spare, seconds = chip.memory - answer["peak"], seconds_of(answer, machine, chip)
    said: dict[str, Any] = {key: value for key, value in answer.items() if key != "loops"}
    said |= {"fits": spare >= 0, "of": chip.memory, "spare": spare / chip.memory, "seconds": seconds.described()}
    said["compiler_s"] = reckoned_by_compiler(answer, chip)
    said["tokens"] = tokens_of(question.run, name)
    if seconds.expected:
        said["tokens_per_s"] = said["tokens"] / seconds.expected
        said["mfu"] = answer["model_flops"] / (seconds.expected * chip.flops * machine.devices)
    if spare < 0:
        wants, has = answer["peak"] / GIB, chip.memory / GIB
        said["reason"] = f"{name} needs {wants:.2f} GiB of a device, which has {has:.2f}: {-spare / GIB:.2f} too much"
    return said


def tokens_of(run: Run, name: str) -> int:
    """Tokens that a run of a program reads or writes, where every row is full."""
    stage, _, program = name.partition("/")
    c = section_of(run, stage)
    if isinstance(c.batch, RankedBatch):
        return c.batch.size * c.batch.candidates * c.batch.length
    if program in ("step", "validation"):
        return c.batch.size * c.batch.length
    sampled = program == "rollout" or program.startswith("responses")
    if not sampled and program not in ("score", "update"):
        return 0
    return c.batch.size * (c.sampling.max_new_tokens + (0 if sampled else c.batch.prompt_length))


def _warnings(run: Run, steps: Mapping[str, Any]) -> Iterable[str]:
    """What fits and is still not what one wants."""
    for name, step in steps.items():
        yield from _of_program(run, name, step)


def _of_program(run: Run, name: str, step: Mapping[str, Any]) -> Iterable[str]:
    program = name.partition("/")[2]
    if step.get("model_flops") and program in ("step", "update") and step.get("mfu", 1.0) < SLOW:
        yield f"{name} reaches {step['mfu']:.0%} of the peak; larger batches or another mesh keep devices busier"
    if program == "rollout" or program.startswith("responses"):
        c = section_of(run, name.partition("/")[0])
        for row in step.get("collectives", ()):
            if row["kind"] == "all_gather" and row["times"] >= c.sampling.max_new_tokens and row["largest"] > 2**22:
                yield f"{name} gathers {row['largest'] / 2**20:.0f} MiB for every token: weights move while it decodes"
    if step.get("fits") and step["spare"] < 0.02:
        yield f"{name} leaves {step['spare']:.1%} of the memory: what a run adds beside the programs may not fit"


def _whole(question: Question, held: Answers, steps: Mapping[str, Any]) -> dict[str, Any]:
    """What all stages take together, and what of the machine they need beside their devices."""
    run, machine = question.run, question.machine
    stages = {stage: _stage(question, stage, held[stage], steps) for stage in held if "failed" not in held[stage]}
    total = Seconds()
    for stage in stages.values():
        total += Seconds(**{end: stage["seconds"][end] for end in ("least", "most")})
    saved = max((stage["saved"] for stage in stages.values()), default=0)
    save_s = saved / machine.hosts / question.assumed.disk
    longest = max((step["seconds"]["most"] for step in steps.values() if "seconds" in step), default=0.0)
    offloaded = max((step.get("host", 0) for step in steps.values()), default=0)
    on_host = min(machine.devices, question.chip.on_host)
    memory = int(2 * saved / machine.hosts + offloaded * on_host + PROCESS)
    return {
        "stages": stages,
        "seconds": total.described(),
        "device_hours": {end: value * machine.devices / 3600 for end, value in total.described().items()},
        "save": {"bytes": saved, "seconds": save_s, "blocks_s": saved / machine.hosts / STAGING},
        "host_memory": {"bytes": memory, "of": question.chip.host_memory, "fits": memory <= question.chip.host_memory},
        "costs": _costs(run, machine, stages, save_s, longest),
        "needs": {
            "platform": question.chip.platform,
            "topology": f"{machine.kind}:{'x'.join(map(str, machine.sizes))}",
            "slices": machine.slices,
            "devices": machine.devices,
            "hosts": machine.hosts,
            "devices_per_host": on_host,
            "grace_s": math.ceil(30 + longest + 1.2 * save_s),
            "host_memory_bytes": memory,
            "disk_bytes": int(saved * (run.checkpoints.keep + 1.2)),
        },
    }


def _stage(question: Question, stage: str, held: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, Any]:
    run = question.run
    own = {name: step for name, step in steps.items() if name.startswith(f"{stage}/")}
    peak = max((step.get("peak", 0) for step in own.values()), default=0)
    one = Seconds()
    for name, step in own.items():
        if "seconds" in step:
            ends = step["seconds"]
            one += Seconds(ends["least"], ends["most"]) * _each_step(run, stage, name)
    count = steps_of(run, stage, question.assumed.rows)
    whole = one * (count or 0)
    return {
        "held": held["held"],
        "saved": held["saved"],
        "peak": peak,
        "steps": count,
        "step_seconds": one.described(),
        "seconds": whole.described(),
    }


def _each_step(run: Run, stage: str, name: str) -> float:
    """How often a program runs for each step of its stage."""
    c, program = section_of(run, stage), name.partition("/")[2]
    if program == "digests":
        return 1 / run.checkpoints.every
    if program == "validation":
        return 1 / c.validate_every
    if FACTS[stage].online and program in ("rollout", "score", "reshard"):
        return getattr(getattr(c, "groups", None), "draws", 1)
    return 1


def steps_of(run: Run, stage: str, rows: Mapping[str, int]) -> int | None:
    """Steps of a stage; None of one that is measured in epochs of rows that nobody counted."""
    c = section_of(run, stage)
    if FACTS[stage].measures:
        return math.ceil(c.samples / c.batch.size)
    if c.steps:
        return c.steps
    return math.ceil(c.epochs * rows[stage] / c.batch.size) if stage in rows else None


def _costs(run: Run, machine: Topology, stages: Mapping[str, Any], save_s: float, longest: float) -> dict[str, float]:
    """Device-hours that a hang and a preemption may cost at most, but for the start."""
    hour = machine.devices / 3600
    step = max((stage["step_seconds"]["expected"] for stage in stages.values()), default=0.0)
    again = step * run.checkpoints.every
    deadline = run.reliability.deadlines.step
    return {
        "preemption_device_hours": (longest + save_s) * hour,
        "failure_device_hours": again * hour,
        "hang_device_hours": (deadline + again) * hour,
    }
