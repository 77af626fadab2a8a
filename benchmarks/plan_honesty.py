"""python -m benchmarks.plan_honesty [--only NAME…]: what a plan says of programs, and what they take on 8 CPU devices.

Each program is planned, and then run in a process of its own on arrays of ones: the most memory that the process has
beyond what it had before (VmHWM) against the plan's peak on all devices, and the plan's FLOPs against those of the
equations, with what is computed again. Writes benchmarks/results/plan_honesty.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, environment_rows

RESULT = Path(__file__).with_name("results") / "plan_honesty.json"
DEVICES = 8
SHAPE = {"layers": 4, "width": 512, "heads": 8, "kv_heads": 4, "mlp_width": 1536, "context": 1024}
# Name: mesh, model beside SHAPE, program, and the passes through the model in that of which model FLOPs are counted.
CASES: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "data": ({"data": 8}, {}, "sft/step"),
    "fsdp": ({"data": 1, "fsdp": 8}, {}, "sft/step"),
    "tensor": ({"data": 2, "tensor": 4}, {}, "sft/step"),
    "sequence": ({"data": 2, "fsdp": 2, "sequence": 2}, {}, "sft/step"),
    "gpt2": ({"data": 2, "fsdp": 4}, {"family": "gpt2", "kv_heads": 8, "mlp_width": 2048}, "sft/step"),
    "deeper": ({"data": 1, "fsdp": 8}, {"layers": 12}, "sft/step"),
    "rollout": ({"data": 2, "fsdp": 4}, {}, "ppo/rollout"),
    "score": ({"data": 2, "fsdp": 4}, {}, "ppo/score"),
    "update": ({"data": 2, "fsdp": 4}, {}, "ppo/update"),
}


def recipe(mesh: dict[str, int], model: dict[str, Any]) -> dict[str, Any]:
    data = [{"source": "unused.jsonl"}]
    fixed = {"data": data, "steps": 10, "optimizer": {"lr": 1e-5}}
    return {
        "name": "honest",
        "mesh": mesh,
        "model": {"family": "llama"} | SHAPE | model,
        "tokenizer": {"vocab_size": 8192, "data": data},
        "stages": {
            "sft": fixed | {"batch": {"size": 16, "length": 1024}},
            "reward": fixed | {"batch": {"size": 16, "length": 512, "candidates": 4}, "normalize": {"on": "none"}},
            "ppo": fixed
            | {"batch": {"size": 64, "minibatch": 32, "epochs": 1, "prompt_length": 128}}
            | {"sampling": {"max_new_tokens": 128}},
        },
    }


def job_of(name: str) -> Any:
    from rlhfjax.config import resolved
    from rlhfjax.config.schema import Run
    from rlhfjax.planning.compiler import Job

    mesh, model, _ = CASES[name]
    run = Run.model_validate(recipe(mesh, model))
    return Job(resolved(run), {"kind": "cpu", "sizes": (DEVICES,), "slices": 1}, {"size": 8192})


def measured(name: str) -> dict[str, Any]:
    """In a process by itself: the plan of a program, then a run of it."""
    import jax
    import jax.numpy as jnp

    from rlhfjax.planning.compiler import Compiler
    from rlhfjax.stages.compilation import unbound

    jax.config.update("jax_num_cpu_devices", DEVICES)
    stage, _, program = CASES[name][2].partition("/")
    compiler = Compiler(job_of(name))
    planned, built = compiler.describe(stage, program), compiler.stage(stage)[program]
    bound, _ = unbound(built.function)
    with jax.numpy_dtype_promotion("standard"):
        made = built.lower().compile()

    def real(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or isinstance(leaf, jax.Array):
            return leaf
        of_keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = jax.random.key(0) if of_keys else jnp.ones(leaf.shape, leaf.dtype)
        return jax.device_put(value, leaf.sharding) if leaf.sharding is not None else value

    before = status("VmRSS")
    arguments = jax.tree.map(real, (bound, built.arguments))
    Path("/proc/self/clear_refs").write_text("5")
    held = status("VmRSS")
    jax.block_until_ready(made(*arguments[0], *arguments[1]))
    taken = status("VmHWM") - before
    expected = DEVICES * (planned["peak"] - planned["beside"])
    return {
        "planned_bytes": expected,
        "taken_bytes": taken,
        "arguments_bytes": held - before,
        "memory": expected / taken,
        "flops": DEVICES * planned["flops"],
        "equations": planned["model_flops"],
        "work": DEVICES * planned["flops"] / planned["model_flops"],
        "digest": planned["digest"],
    }


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one)))
        return
    found = {}
    for name in given.only or CASES:
        words = [sys.executable, "-m", "benchmarks.plan_honesty", "--one", name]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr[-1500:], file=sys.stderr)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:10} memory {found[name]['memory']:.3f}  work {found[name]['work']:.3f}", flush=True)
    if not given.only:
        environment = {row["metric"]: row["value"] for row in environment_rows([], "planned and run", {})}
        RESULT.write_text(json.dumps({"environment": environment, "programs": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
