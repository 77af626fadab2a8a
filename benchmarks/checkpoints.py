"""The time for which saving keeps training waiting, on the model of quickstart.

    JAX_PLATFORMS=cpu python -m benchmarks.checkpoints [key=value…]

Runs some steps of pretraining and of PPO on the prepared movies with a save every few steps, and takes the time that
`Checkpoints.save` needs until training goes on. What it takes of the training time is counted at the default interval,
`checkpoints.every` of quickstart. Writes benchmarks/results/checkpoints.json.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from rlhfjax.training.checkpoint import Checkpoints

RESULT = Path(__file__).with_name("results") / "checkpoints.json"
SHORT = [
    *("stages.pretrain.steps=40", "stages.pretrain.optimizer.warmup_steps=5", "stages.ppo.steps=12"),
    *("stages.sft.epochs=null", "stages.sft.steps=2", "stages.sft.optimizer.warmup_steps=1"),
    *("stages.reward.steps=2", "stages.reward.optimizer.warmup_steps=1", "stages.evaluate=null"),
    *("checkpoints.every=4", "logging.tensorboard=false"),
]
STAGES = ("pretrain", "ppo")


def main() -> None:
    default = load_config("quickstart").checkpoints.every
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        blocked = blocked_by_stage(run_dir)
        result = {"every": default} | {stage: measured(run_dir / stage, blocked[stage], default) for stage in STAGES}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{'stage':>9} {'MB saved':>9} {'save blocks':>12} {'one step':>9} {'of the time, every ' + str(default):>24}"
    )
    for stage in STAGES:
        r = result[stage]
        print(f"{stage:>9} {r['megabytes']:9.1f} {r['save_s']:10.3f} s {r['step_s']:7.3f} s {r['share']:12.2%}")


def blocked_by_stage(run_dir: Path) -> dict[str, list[float]]:
    """Seconds of every save, by stage; the first of a stage, which also compiles the digests, is left out."""
    seconds: dict[str, list[float]] = {}
    save = Checkpoints.save

    def timed(self, *args, **kwargs):
        began = time.perf_counter()
        save(self, *args, **kwargs)
        seconds.setdefault(self.directory.parent.name, []).append(time.perf_counter() - began)

    Checkpoints.save = timed
    try:
        run_recipe(load_config("quickstart", [*SHORT, *sys.argv[1:]]), run_dir)
    finally:
        Checkpoints.save = save
    return {stage: each[1:] for stage, each in seconds.items()}


def measured(stage_dir: Path, blocked: list[float], every: int) -> dict[str, float]:
    """Medians of a stage, and the share of its time that saves block at the default interval."""
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    step, save = statistics.median(row["timing/step_s"] for row in rows[1:]), statistics.median(blocked)
    last = max((path for path in (stage_dir / "checkpoints").glob("*")), key=lambda path: int(path.name))
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    return {
        "megabytes": size / 1e6,
        "saves": len(blocked),
        "save_s": save,
        "step_s": step,
        "share": save / (every * step),
    }


if __name__ == "__main__":
    main()
