"""`python -m rlhfjax.planning.compiler`: compiles programs for machines that are not here, and says what they are.

A process of its own: a compiler may die, and keeps the memory that it took. The first line of its input is a `Job` in
JSON, each after it the name of a program, STAGE/NAME; each is answered by a line of JSON.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rlhfjax.planning.absent_gpu import described_as
from rlhfjax.planning.memo import remembered
from rlhfjax.planning.topology import ENVIRONMENT, Topology

_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm|\(([\d.]+)([KMGT]?)\) exceeds")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SHOWN = 8  # of the largest leaves and buffers


@dataclass(frozen=True)
class Job:
    """What to build: a resolved configuration, the machine, the words of its tokenizer; where programs are kept."""

    config: dict[str, Any]
    topology: dict[str, Any]
    vocabulary: dict[str, Any]
    longest: int | None = None
    programs: str | None = None

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def machine(self) -> Topology:
        return Topology(self.topology["kind"], tuple(self.topology["sizes"]), self.topology["slices"])


class Compiler:
    """Builds stages, and compiles their programs."""

    def __init__(self, job: Job):
        self._job, self._built = job, {}

    @cached_property
    def _devices(self) -> list[Any]:
        return self._job.machine.found()

    @cached_property
    def _run(self) -> Any:
        from rlhfjax.config.schema import Run

        return Run.model_validate(self._job.config)

    def stage(self, stage: str) -> dict[str, Any]:
        """The programs of a stage, built once."""
        from rlhfjax.sharding import make_mesh
        from rlhfjax.stages.building import Vocabulary, build
        from rlhfjax.target import target_of

        if stage not in self._built:
            axes = self._run.mesh.of(stage)
            mesh = make_mesh(**axes.axes, slices=axes.slices, devices=self._devices)
            words = Vocabulary(**self._job.vocabulary)
            target = target_of(mesh, self._run.reliability.sizes.model_dump())
            self._built[stage] = build(self._run, stage, mesh, target, words, longest=self._job.longest)
        return self._built[stage]

    def names(self, stage: str) -> dict[str, Any]:
        """The programs of a stage, and what it holds on a device and on its host."""
        built = self.stage(stage)
        held = next(iter(built.values())).held if built else ()
        return {"programs": list(built), "held": sum(map(_on_device, _leaves(held))), "saved": _saved(built)}

    def describe(self, stage: str, name: str) -> dict[str, Any]:
        """What a program is: its digest, memory, work and collectives, and the seconds that it took to make.

        What was found of one is remembered by its text and its compiler, so that a plan of a changed recipe compiles
        what changed.
        """
        import jax

        program = self.stage(stage)[name]
        with jax.numpy_dtype_promotion("standard"):  # Flax's norms widen bfloat16 by themselves
            lowered = program.lower()
            digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
            turns = self._turns(stage, name, program.target)
            known = remembered(digest, self._job, turns)
            found: dict[str, Any] | None = None if self._job.programs else known.read()
            if found is None:
                began = time.monotonic(), time.process_time()
                made = lowered.compile()
                found = {"compile_s": time.monotonic() - began[0], "compile_cpu_s": time.process_time() - began[1]}
                found |= described(made, turns) | {"memory": sizes_of(made)}
                known.write(found)
        own = {"digest": digest[:16], "model_flops": program.flops}
        return own | {key: value for key, value in found.items() if key != "memory"} | placed(program, found["memory"])

    def _turns(self, stage: str, name: str, target: Any) -> tuple[int, int]:
        """Of a sampler, tokens of a response as long as it may be, and how often it decodes then; of others (0, 0)."""
        from rlhfjax.config.recipe import section_of

        if name != "rollout" and not name.startswith("responses"):
            return 0, 0
        c = section_of(self._run, stage)
        return c.sampling.max_new_tokens, math.ceil(c.batch.size / target.slots) * c.sampling.max_new_tokens


def described(made: Any, turns: tuple[int, int]) -> dict[str, Any]:
    """Work and collectives of a compiled program, of one device, loops as often as they run.

    `turns` are the tokens of a response and how often a sampler decodes, which its text need not say.
    """
    from rlhfjax.planning.hlo import Program

    program = Program(made.as_text())
    walked = program.walked()
    tokens, times = turns
    if tokens and not any(loop.trips >= tokens - 1 and not loop.open for loop, _ in walked.every()):
        walked.bound(times)
    loops = [_described(loop, times) for loop, times in walked.every()]
    return {
        "flops": sum(loop["flops"] * loop["times"] for loop in loops),
        "moved": walked.total("moved"),
        "cycles": walked.total("cycles"),
        "between": sum(walked.total_between().values()),
        "collectives": collectives(walked),
        "loops": loops,
        "buffers": buffers(program),
    }


def _described(loop: Any, times: float) -> dict[str, Any]:
    return {
        "times": times,
        "flops": loop.flops + loop.cached_flops + loop.attended_flops,
        "kernels": loop.kernel_flops,
        "moved": loop.moved,
        "cycles": loop.cycles,
        "sent": _sent(loop),
        "between": sum(loop.between.values()),
    }


def _sent(loop: Any) -> list[list[float]]:
    """Bytes that a device sends by the size of the group, and how many collectives that are."""
    sums: dict[int, list[float]] = {}
    for one in loop.collectives:
        size, count = sums.get(one.group, [0.0, 0])
        sums[one.group] = [size + one.ring, count + 1]
    return [[group, *both] for group, both in sorted(sums.items())]


def collectives(walked: Any) -> list[dict[str, Any]]:
    """Kinds by group: how often they run and what a device sends in all, the most first."""
    sums: dict[tuple[str, int], list[float]] = {}
    for loop, times in walked.every():
        for one in loop.collectives:
            row = sums.setdefault((one.kind, one.group), [0.0, 0.0, 0.0])
            row[0] += one.ring * times
            row[1] += times
            row[2] = max(row[2], one.ring)
    rows = [
        {"kind": kind, "group": group, "bytes": size, "times": times, "largest": largest}
        for (kind, group), (size, times, largest) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def buffers(program: Any) -> list[list[Any]]:
    """The largest results of operations that are no arguments: [bytes, shape, where it comes from]."""
    from rlhfjax.planning.hlo_text import bytes_of

    found = {}
    for name, lines in program.computations.items():
        if "fused" in name:
            continue
        for one in lines:
            if one.opcode in ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "optimization-barrier"):
                continue
            source = re.search(r'op_name="([^"]*)"', one.rest)
            kind, sizes = one.shapes[0] if one.shapes else ("", ())
            shape = f"{kind}[{','.join(map(str, sizes))}]"
            key = (shape, source[1] if source else one.opcode)
            found[key] = max(found.get(key, 0.0), bytes_of(one.shapes[:1]))
    most = sorted(found.items(), key=lambda item: -item[1])[:SHOWN]
    return [[size, shape, where] for (shape, where), size in most]


def sizes_of(made: Any) -> dict[str, int]:
    """Bytes of a compiled program on one device."""
    found = made.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "results": max(found.output_size_in_bytes - found.alias_size_in_bytes, 0),
        "code": found.generated_code_size_in_bytes,
        "peak": getattr(found, "peak_memory_in_bytes", 0),
        "host": found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    }


def placed(program: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Those bytes with what the stage holds beside the arguments, and the largest of these."""
    read = {id(leaf) for leaf in _leaves((_bound(program), program.arguments))}
    beside = sum(_on_device(leaf) for leaf in _leaves(program.held) if id(leaf) not in read)
    peak = max(sizes["peak"], sizes["arguments"] + sizes["temporaries"] + sizes["results"])
    return sizes | {"beside": beside, "peak": peak + beside, "leaves": largest_leaves(program)}


def largest_leaves(program: Any) -> list[list[Any]]:
    """The largest arrays among the arguments: [bytes on a device, what all devices hold of it, name]."""
    import jax

    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path((_bound(program), program.arguments)):
        if hasattr(leaf, "shape"):
            shape = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
            rows.append([_on_device(leaf), shape, jax.tree_util.keystr(path[2:], simple=True, separator="/")])
    return sorted(rows, key=lambda row: -row[0])[:SHOWN]


def _bound(program: Any) -> tuple:
    from rlhfjax.stages.compilation import unbound

    return unbound(program.function)[0]


def _leaves(tree: Any) -> list[Any]:
    import jax

    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]


def _on_device(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    if getattr(sharding, "memory_kind", None) == "pinned_host":
        return 0
    shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
    return math.prod(shape) * (leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 8)


def _saved(built: dict[str, Any]) -> int:
    """Bytes of what a save writes, on all devices together."""
    trained = built.get("step") or built.get("update")
    state = trained.arguments[0] if trained else ()
    return sum(leaf.size * getattr(leaf.dtype, "itemsize", 8) for leaf in _leaves(state))


def failure(error: BaseException) -> dict[str, Any]:
    """What a compiler said that made nothing: how much it wanted where that was too much."""
    said = str(error)
    if found := _OUT_OF_MEMORY.search(said):
        size, unit = (found[1], found[2]) if found[1] else (found[5], found[6])
        return {"failed": "memory", "wants": float(size) * _UNITS[unit], "said": said.splitlines()[0][:300]}
    return {"failed": type(error).__name__, "said": (said.splitlines() or [""])[0][:300]}


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """What each line asks for."""
    job = Job(**json.loads(next(lines)))
    compiler = Compiler(job)
    for line in lines:
        stage, _, name = line.strip().partition("/")
        try:
            yield compiler.describe(stage, name) if name else compiler.names(stage)
        except Exception as error:  # whatever the compiler or the mesh says
            yield failure(error)


def main() -> int:
    """Answers until the input ends. jax is told of the machine before it starts."""
    first = sys.stdin.readline()
    job = Job(**json.loads(first))
    os.environ |= ENVIRONMENT
    if job.machine.chip_platform == "gpu":
        # Tiles of Triton are tuned on a device, and there is none.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
    import jax

    if job.machine.chip_platform == "gpu":
        described_as(8.0 if job.machine.kind == "a100" else 9.0)
    if job.machine.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", job.machine.devices)
    if job.programs:
        _keep(job.programs)
    said, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    for answer in answers(_lines(first)):
        print(json.dumps(answer), file=said, flush=True)
    return 0


def _lines(first: str) -> Iterator[str]:
    yield first
    yield from iter(sys.stdin.readline, "")


def _keep(directory: str) -> None:
    import jax

    config: Any = jax.config
    config.update("jax_compilation_cache_dir", directory)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config.update("jax_persistent_cache_enable_xla_caches", "none")  # whose place is a part of each program's key


if __name__ == "__main__":
    sys.exit(main())
