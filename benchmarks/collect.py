"""One small result file of finished runs, and the tables of docs/results.md and README.md of all result files.

    python -m benchmarks.collect RUN_DIR… --json benchmarks/results/NAME.json
    python -m benchmarks.collect --readme

Every figure is copied from what the runs left behind (evaluation.json, manifest.jsonl, complete.json). Nothing is
measured here, and the same files give the same bytes.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.blocks import write_block
from benchmarks.tables import Result, summary, tables
from rlhfjax.config import config_hash, load_config, shipped
from rlhfjax.config.recipe import NAMES, SUPERVISED
from rlhfjax.errors import ConfigError, DataError, RlhfjaxError
from rlhfjax.evaluation.report.run_data import read_run
from rlhfjax.evaluation.results import Evaluation, PolicyRow
from rlhfjax.evaluation.statistics import Interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "results.md"
KIND = "recipe runs"  # tells these files from results of another kind in the same folder
_FREE = ("seed", "description", "data_dir")  # what the runs of one file may differ in
_DIGITS = 5


def collect_run(run_dir: Path) -> Result:
    """What one finished run says of itself and of its models, as plain JSON.

    Raises ConfigError where the run has not been evaluated.
    """
    run = read_run(run_dir)
    if run.evaluation is None or not run.attempts:
        raise ConfigError(f"{run_dir}: expected a finished run with evaluate/evaluation.json; run its stages first")
    last = run.attempts[-1]
    fixed = {key: value for key, value in last["config"].items() if key not in _FREE}
    return {
        "config": last["config"]["name"],
        "recipe_hash": hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest(),
        "name": run.name,
        "seed": run.evaluation.seed,
        "date": run.evaluation.date,
        "hardware": run.evaluation.hardware,
        "command": _command(last, run.name),
        "config_hash": last["config_hash"],
        "commit": _commit(last.get("git")),
        "attempts": len(run.attempts),
        "versions": {"python": last["python"]} | last["packages"],
        "stage_seconds": _stage_seconds(run_dir),
    } | _figures(run.evaluation)


def _command(attempt: dict[str, Any], run_name: str) -> str:
    """The command that repeats the run: of a shipped configuration by its name and seed, else as it was given."""
    name, seed = attempt["config"]["name"], attempt["seed"]
    overrides = [] if seed == 0 else [f"seed={seed}"]
    if name not in shipped() or config_hash(load_config(name, overrides)) != attempt["config_hash"]:
        words = (word.rpartition("/")[2] if word.startswith("/") else word for word in attempt["argv"][1:])
        return shlex.join(["rlhfjax", *words])  # however it was started; without directories of the machine it ran on
    where = [] if run_name == name else ["--run-dir", f"runs/{run_name}"]
    return shlex.join(["rlhfjax", "run", name, *overrides, *where])


def _commit(git: dict[str, Any] | None) -> str | None:
    return git["sha"][:12] + (" with local changes" if git["dirty"] else "") if git else None


def _stage_seconds(run_dir: Path) -> dict[str, float]:
    paths = {stage: run_dir / stage / "complete.json" for stage in NAMES}
    return {stage: json.loads(path.read_text("utf-8"))["seconds"] for stage, path in paths.items() if path.is_file()}


def _figures(found: Evaluation) -> Result:
    sft = {policy.name: policy for policy in found.policies}.get(SUPERVISED)
    sft_losses = found.heldout_losses.get(SUPERVISED, {})
    losses = {
        stage: {name: _loss(loss, sft_losses.get(name) if stage != SUPERVISED else None) for name, loss in sets.items()}
        for stage, sets in found.heldout_losses.items()
    }
    wins = ("judge", "policy", "baseline", "win", "policy_mean", "baseline_mean")
    return rounded(
        {
            "heldout_losses": losses,
            "reward_accuracy": _merged((row.name, row.values) for row in found.reward_accuracy),
            "judge_accuracy": _merged((row.name, row.values) for row in found.judge_accuracy),
            "win_rates": [{key: getattr(row, key) for key in wins} for row in found.win_rates],
            "policies": {policy.name: _policy(policy, sft) for policy in found.policies},
        }
    )


def _loss(loss: float, before: float | None) -> Result:
    return {"nats_per_token": loss} | ({"change_from_sft": loss / before - 1} if before else {})


def _merged(rows: Iterable[tuple[str, dict[str, Interval | None]]]) -> dict[str, dict[str, Interval | None]]:
    """One entry per scorer, which may have a row for rated texts and another for comparisons."""
    merged: dict[str, dict[str, Interval | None]] = {}
    for name, values in rows:
        merged.setdefault(name, {}).update(values)
    return merged


def _policy(policy: PolicyRow, sft: PolicyRow | None) -> Result:
    keys = ("responses", "length", "distinct_1", "distinct_2", "eos_rate", "repetition", "kl", "entropy", "reward")
    measured = {key: getattr(policy, key) for key in keys} | {"intervals": policy.intervals}
    if sft is None or policy.name == sft.name:
        return measured
    before = {key: getattr(sft, key) for key in ("length", "distinct_2")}
    return measured | {f"{key}_change_from_sft": measured[key] / old - 1 for key, old in before.items() if old}


def rounded(value: Any) -> Any:
    """Plain JSON with five digits; what is not finite is null, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value


def collect(run_dirs: Sequence[Path]) -> Result:
    """The content of one result file: the runs of one configuration under different seeds or versions of jax.

    Raises ConfigError when two runs differ in more than these, or share both.
    """
    runs = sorted((collect_run(path) for path in run_dirs), key=lambda run: (run["versions"]["jax"], run["seed"]))
    shared = {key: runs[0][key] for key in ("config", "recipe_hash")}
    for before, run in pairwise(runs):
        if any(run[key] != value for key, value in shared.items()) or _kind(run) == _kind(before):
            raise ConfigError(
                f"expected runs of one configuration under different seeds or versions of jax, got {before['name']} "
                f"({_kind(before)}) and {run['name']} ({_kind(run)}); collect other configurations apart"
            )
    return {"kind": KIND} | shared | {"runs": [{k: v for k, v in run.items() if k not in shared} for run in runs]}


def _kind(run: Result) -> str:
    return f"seed {run['seed']}, jax {run['versions']['jax']}"


def read_results(folder: Path) -> list[Result]:
    """The results in a folder, by file name. Raises DataError for a file that is not JSON."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: expected JSON, got {error}; collect it again") from None
        if isinstance(result, dict) and result.get("kind") == KIND:
            found.append(result)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect", description="Results of finished runs.")
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="*", type=Path, help="finished runs, one per seed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results of these runs to FILE")
    parser.add_argument("--readme", action="store_true", help="write the tables of all result files")
    given = parser.parse_args(arguments)
    if not given.run_dirs and (given.json or not given.readme):
        parser.error("expected RUN_DIR, or --readme")
    try:
        if given.run_dirs:
            result = collect(given.run_dirs)
            if given.json:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(tables([result]))
        if given.readme:
            results = read_results(RESULTS)
            write_block(DOCUMENT, "results", tables(results))
            write_block(README, "results", summary(results))
    except RlhfjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
