"""python -m benchmarks.peers.maxtext_step JSON: MaxText's own ahead-of-time compile of a step, described like ours.

JSON is a `benchmarks.shapes.Case` that `PEER` names in MaxText's words. Runs in MaxText's environment.
"""

import json
import sys
import time
from typing import Any

from benchmarks.compile_one import described  # sets the environment of libtpu before jax starts
from benchmarks.shapes import PEER, layers_of

COMMON = {
    "enable_checkpointing": "false",
    "dataset_type": "synthetic",
    "compile_topology_num_slices": 1,
    "remat_policy": "full",
}


def main(words: list[str]) -> int:
    case = json.loads(words[0])
    import jax
    from maxtext.trainers.pre_train import train_compile

    kept: dict[str, Any] = {}
    lower, compile_it = jax.stages.Traced.lower, jax.stages.Lowered.compile

    def lowered(self, *given, **how):
        began = time.monotonic()
        made = lower(self, *given, **how)
        kept["lower_s"] = time.monotonic() - began
        return made

    def compiled(self, *given, **how):
        began = time.monotonic(), time.process_time()
        program = compile_it(self, *given, **how)
        kept.update(compile_s=time.monotonic() - began[0], compile_cpu_s=time.process_time() - began[1])
        kept["program"] = program
        return program

    jax.stages.Traced.lower, jax.stages.Lowered.compile = lowered, compiled
    settings = COMMON | {"max_target_length": case["length"]} | PEER[case["name"]]
    train_compile.main(["maxtext", *(f"{name}={value}" for name, value in settings.items())])
    program = kept.pop("program")
    if case.get("text"):
        with open(case["text"], "w", encoding="utf-8") as file:
            file.write(program.as_text())
    print(json.dumps(described(program, layers_of(case)) | {"lower_s": 0.0} | kept))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
