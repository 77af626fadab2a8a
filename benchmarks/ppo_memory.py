"""Resident memory of a process over 300 PPO iterations of a tiny model: it must not grow.

    JAX_PLATFORMS=cpu python -m benchmarks.ppo_memory [key=value…]

Writes benchmarks/results/ppo_memory.csv and ppo_memory.png, and prints the slope over the second half.
"""

import csv
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.lora_memory import recipe
from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from rlhfjax.stages import online

RESULTS = Path(__file__).with_name("results")
ITERATIONS = 300
TINY = ["model.layers=2", "model.width=32", "model.heads=2", "model.mlp_width=64", f"stages.ppo.steps={ITERATIONS}"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(json.dumps(recipe(Path(folder), None)), encoding="utf-8")
        megabytes = watched([*TINY, "checkpoints.every=20", *sys.argv[1:]], path, Path(folder) / "run")
    with (RESULTS / "ppo_memory.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["iteration", "resident_mb"])
        rows.writerows((i, f"{size:.1f}") for i, size in enumerate(megabytes, 1))
    draw(megabytes, RESULTS / "ppo_memory.png")
    half = len(megabytes) // 2
    slope = np.polyfit(np.arange(half, len(megabytes)), megabytes[half:], 1)[0]
    print(f"{megabytes[9]:.0f} MB at iteration 10, {megabytes[half]:.0f} at {half}, {megabytes[-1]:.0f} at the end")
    print(f"second half: {1000 * slope:+.1f} kB an iteration")


def watched(overrides: list[str], path: Path, run_dir: Path) -> list[float]:
    """Megabytes resident when each iteration begins."""
    sizes, loop = [], online.train_online

    def counted(steps, *args, **kwargs):
        def rollout(*inputs):
            sizes.append(resident())
            return steps.rollout(*inputs)

        return loop(replace(steps, rollout=rollout), *args, **kwargs)

    online.train_online = counted
    try:
        run_recipe(load_config(str(path), overrides), run_dir)
    finally:
        online.train_online = loop
    return sizes


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def draw(megabytes: list[float], path: Path) -> None:
    """The figure: memory over iterations, from zero."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(range(1, len(megabytes) + 1), megabytes, color="tab:blue", linewidth=1.2)
    axes.set(xlabel="PPO iteration", ylabel="resident memory, MB", xlim=(0, len(megabytes)), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
