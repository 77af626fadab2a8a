"""python -m benchmarks.compile_one JSON: compiles one program for devices that are not here and says what it is.

JSON is a `benchmarks.shapes.Case`. A process of its own, since a compiler may die, and takes memory that it keeps.
"""

import json
import os
import sys
import time
from typing import Any

from benchmarks.shapes import layers_of, run_of
from rlhfjax.planning.topology import ENVIRONMENT, parsed

os.environ |= ENVIRONMENT
GIB = 2**30


def compiled(case: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """The compiled program, and the seconds that lowering and compiling took."""
    import jax

    from rlhfjax.sharding import make_mesh
    from rlhfjax.stages.building import Vocabulary, build
    from rlhfjax.target import target_of

    chips = parsed(case["topology"], case["slices"]).found()
    run = run_of(case)
    mesh = make_mesh(**run.mesh.axes, slices=run.mesh.slices, devices=chips)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms widen bfloat16 by themselves
        began = time.monotonic(), time.process_time()
        words = run.tokenizer.vocab_size
        program = build(run, case["stage"], mesh, target_of(mesh), Vocabulary(words))[case["program"]]
        lowered = program.lower()
        between = time.monotonic(), time.process_time()
        made = lowered.compile()
    return made, {
        "lower_s": between[0] - began[0],
        "compile_s": time.monotonic() - between[0],
        "compile_cpu_s": time.process_time() - between[1],
    }


def described(program: Any, layers: int) -> dict[str, Any]:
    """Bytes that a device needs, products, bytes of collectives: those in loops over layers, and the others."""
    from rlhfjax.planning.hlo import Program

    memory = program.memory_analysis()
    walked = Program(program.as_text()).walked()
    inner = list(walked.of_turns(layers))
    sums = {
        f"{place}_{how}_gib": sum(times * loop.total_bytes(how) for loop, times in loops) / GIB
        for place, loops in (("inside", inner), ("all", [(walked, 1.0)]))
        for how in ("result", "ring")
    }
    return {
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "host_arguments_gib": memory.host_argument_size_in_bytes / GIB,
        "host_temporaries_gib": memory.host_temp_size_in_bytes / GIB,
        "peak_gib": getattr(memory, "peak_memory_in_bytes", 0) / GIB,
        "product_flops": walked.total("flops"),
        "cached_flops": walked.total("cached_flops"),
        **{f"outside_{how}_gib": sums[f"all_{how}_gib"] - sums[f"inside_{how}_gib"] for how in ("result", "ring")},
        **{name: size for name, size in sums.items() if name.startswith("inside")},
        "between_gib": {what: size / GIB for what, size in walked.total_between().items()},
        "by_kind_gib": {kind: size / GIB for kind, size in walked.by_kind().items()},
        "most_gib": most(walked),
    }


def musts(case: dict[str, Any]) -> dict[str, float]:
    """What the program has to send and to compute at least, where shapes alone say it."""
    from benchmarks.bounds import must_compute, must_send

    flops = must_compute(case)
    sent = {f"must_{place}_gib": size / GIB for place, size in (must_send(case) or {}).items()}
    return sent | ({"must_product_flops": flops} if flops else {})


def most(walked: Any) -> list[list[Any]]:
    """The largest collectives outside of loops, and of each loop a turn: [loop, its turns, kind, shape, GiB sent]."""
    found = [
        [loop.name if loop is not walked else "", times, one.kind, one.shape, round(one.ring / GIB, 4)]
        for loop, times in walked.every()
        for one in loop.collectives
    ]
    return sorted(found, key=lambda row: -row[1] * row[4])[:12]


def main(words: list[str]) -> int:
    case = json.loads(words[0])
    program, seconds = compiled(case)
    if case.get("text"):
        with open(case["text"], "w", encoding="utf-8") as file:
            file.write(program.as_text())
    print(json.dumps(described(program, layers_of(case)) | seconds | musts(case)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
