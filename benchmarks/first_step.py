"""python -m benchmarks.first_step [--rounds N]: PPO's first step, cold and with a plan's programs.

Earlier stages run once, briefly. Then processes take turns on copies of that run: one without any compiled program, and
one with those that `rlhfjax plan --programs` kept. Writes benchmarks/results/first_step.json.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.command import environment_rows

RESULT = Path(__file__).with_name("results") / "first_step.json"
STEPS = {"pretrain": 20, "reward": 10, "ppo": 2}
WARMUP = {"pretrain": 0, "sft": 0, "reward": 0, "ppo": 8}
BRIEF = [f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()]
BRIEF += [f"stages.{stage}.optimizer.warmup_steps={steps}" for stage, steps in WARMUP.items()]
SAID = re.compile(r"first step after ([\d.]+) s(?:; programs of the plan: (\d+) loaded, (\d+) compiled)?")


def rlhfjax(*words: object, **environment: str) -> str:
    """What it says, once it ended well."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhfjax.cli", *map(str, words)],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"rlhfjax {words[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stderr


def first_step(folder: Path, *plan: object) -> tuple[float, list[int]]:
    """Seconds from the start of the stage, and the programs of a plan that were loaded and compiled."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        shutil.copytree(folder / "before", f"{here}/run", symlinks=True)
        words = ["run", "quickstart", *BRIEF, "--only", "ppo", "--run-dir", f"{here}/run", *plan]
        said = rlhfjax(*words, JAX_COMPILATION_CACHE_DIR=f"{here}/compiled")
    found = SAID.search(said)
    if not found:
        raise RuntimeError(f"no first step in\n{said[-2000:]}")
    return float(found[1]), [int(count) for count in found.groups()[1:] if count is not None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rlhfjax("data", "prepare", "movies")
        for stage in ("tokenizer", "pretrain", "sft", "reward"):
            rlhfjax("run", "quickstart", *BRIEF, "--only", stage, "--run-dir", folder / "before")
        rlhfjax("plan", "quickstart", *BRIEF, "--devices", 1, "--programs", folder / "plan", "--no-search")
        rows = []
        for _ in range(given.rounds):
            cold, _ = first_step(folder)
            planned, (loaded, compiled) = first_step(folder, "--plan", folder / "plan")
            rows.append({"cold_s": cold, "planned_s": planned, "loaded": loaded, "compiled": compiled})
            print(
                f"cold {cold:.1f} s, with a plan {planned:.1f} s ({planned / cold:.0%}), {compiled} compiled",
                flush=True,
            )
    ratio = statistics.median(row["planned_s"] / row["cold_s"] for row in rows)
    environment = {row["metric"]: row["value"] for row in environment_rows(["first_step"], "CPU", {})}
    found = {"environment": environment, "ratio": ratio, "rounds": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"median {ratio:.0%}")


if __name__ == "__main__":
    main()
