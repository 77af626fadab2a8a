"""python -m benchmarks.scale [--only NAME…] [--search]: plans of the shipped recipes on pods, and their docs/scale.md.

Each recipe of RECIPES on each topology of TOPOLOGIES with its mesh, as `rlhfjax plan` makes it. What is there of
these versions is kept, so that what was broken off goes on. Writes benchmarks/results/scale.json after each plan, and
the tables of docs/scale.md at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT
from rlhfjax.planning.table import duration
from rlhfjax.planning.versions import versions

RESULT = Path(__file__).with_name("results") / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
TOPOLOGIES = {
    "v5e:16x16": ("v5e:16x16", 1),
    "v6e:16x16": ("v6e:16x16", 1),
    "tpu7x:4x4x8": ("tpu7x:4x4x8", 1),
    "v5p:8x8x8": ("v5p:8x8x8", 1),
    "2 x v5p:8x8x8": ("v5p:8x8x8", 2),
    "v5p:8x8x16": ("v5p:8x8x16", 1),
    "h100:8x8": ("h100:8x8", 1),
}
_EIGHT = {
    "v5e:16x16": "fsdp=64 tensor=4",
    "v6e:16x16": "fsdp=64 tensor=4",
    "tpu7x:4x4x8": "fsdp=64 tensor=4",
    "v5p:8x8x8": "fsdp=128 tensor=4",
    "2 x v5p:8x8x8": "data=2 fsdp=64 tensor=8",
    "v5p:8x8x16": "fsdp=128 tensor=8",
    "h100:8x8": "fsdp=64 tensor=1",
}
_SEVENTY = {
    "v5e:16x16": "fsdp=32 tensor=8",
    "v6e:16x16": "fsdp=32 tensor=8",
    "tpu7x:4x4x8": "fsdp=32 tensor=8",
    "v5p:8x8x8": "fsdp=64 tensor=8",
    "2 x v5p:8x8x8": "data=2 fsdp=64 tensor=8",
    "v5p:8x8x16": "fsdp=128 tensor=8",
    "h100:8x8": "fsdp=8 tensor=8",
}
_EXPERTS = {
    "v5e:16x16": "fsdp=16 expert=8 tensor=2",
    "v6e:16x16": "fsdp=16 expert=8 tensor=2",
    "tpu7x:4x4x8": "fsdp=16 expert=8 tensor=2",
    "v5p:8x8x8": "fsdp=16 expert=8 tensor=4",
    "2 x v5p:8x8x8": "data=2 fsdp=8 expert=8 tensor=4 sequence=2",
    "v5p:8x8x16": "fsdp=16 expert=8 tensor=4 sequence=2",
    "h100:8x8": "fsdp=8 expert=8 tensor=1",
}
_INSTRUCT = {
    "v5e:16x16": "fsdp=8 sequence=4 tensor=8",
    "v6e:16x16": "fsdp=8 sequence=4 tensor=8",
    "tpu7x:4x4x8": "fsdp=8 sequence=4 tensor=8",
    "v5p:8x8x8": "fsdp=8 sequence=8 tensor=8",
    "2 x v5p:8x8x8": "data=2 fsdp=4 sequence=16 tensor=8",
    "v5p:8x8x16": "fsdp=8 sequence=16 tensor=8",
    "h100:8x8": "fsdp=8 sequence=1 tensor=8",
}
RECIPES = {
    "llama3_8b_ppo": _EIGHT,
    "llama3_70b_ppo": _SEVENTY,
    "qwen3_30b_a3b_ppo": _EXPERTS,
    "instructgpt_175b": _INSTRUCT,
    "llama3_8b_grpo": {"v5p:8x8x8": "fsdp=128 tensor=4"},
}
# Weak scaling: as many rows for each device on every slice; `batch.size` of SFT, of PPO and its minibatch.
WEAK = {
    f"weak/{devices}": (topology, mesh, rows)
    for devices, topology, mesh, rows in (
        (16, "v5p:2x2x4", "fsdp=4 tensor=4", 8),
        (64, "v5p:4x4x4", "fsdp=16 tensor=4", 32),
        (256, "v5p:4x8x8", "fsdp=64 tensor=4", 128),
        (1024, "v5p:8x8x16", "fsdp=256 tensor=4", 512),
    )
}


def cases() -> dict[str, list[str]]:
    """The words of `rlhfjax plan` by name, those that say most first."""
    found = {}
    for recipe, meshes in RECIPES.items():
        for name, mesh in meshes.items():
            topology, slices = TOPOLOGIES[name]
            words = [recipe, *(f"mesh.{part}" for part in mesh.split()), "--topology", topology]
            found[f"{recipe} on {name}"] = [*words, "--num-slices", str(slices)]
    for name, (topology, mesh, rows) in WEAK.items():
        sizes = [f"stages.{key}={rows}" for key in ("sft.batch.size", "reward.batch.size", "ppo.batch.minibatch")]
        sizes += [f"stages.ppo.batch.size={4 * rows}", f"stages.evaluate.batch.size={rows}"]
        words = ["llama3_8b_ppo", *(f"mesh.{part}" for part in mesh.split()), *sizes, "--topology", topology]
        found[name] = words
    return found


def planned(words: list[str]) -> dict[str, Any]:
    """The plan that a process of `rlhfjax plan` writes, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "rlhfjax.cli", "plan", *words, "--assume", "minutes=60", "--json", str(file)],
            text=True,
            capture_output=True,
        )
        took = time.monotonic() - began
        if not file.exists():
            return {"failed": done.stderr.strip().splitlines()[-1][:400], "took_s": took, "versions": versions()}
        plan = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: plan[key] for key in plan if key not in ("config", "steps")}
    steps = {name: {key: step[key] for key in STEP if key in step} for name, step in plan["steps"].items()}
    return kept | {"steps": steps, "took_s": took}


STEP = ("fits", "reason", "peak", "of", "flops", "seconds", "mfu", "compile_s", "compile_cpu_s", "between", "digest")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--search", action="store_true", help="look for changes of what does not fit, and again")
    given = parser.parse_args()
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name, words in cases().items():
        wanted = not given.only or any(part in name for part in given.only)
        before = results.get(name, {})
        known = before.get("versions") == versions()
        unsearched = given.search and not before.get("fits", True) and not before.get("remedies")
        if wanted and (unsearched or not known):
            results[name] = planned([*words, "--search" if given.search else "--no-search"]) | {"words": words}
            RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(line(name, results[name]), flush=True)
    write_page(results)


HEADS = (
    *("topology", "mesh", "fits", "largest program", "GiB a device", "spare"),
    *("iteration", "MFU of the update", "device-hours"),
)


def line(name: str, plan: dict[str, Any]) -> str:
    """A row of the table."""
    mesh = " ".join(word.removeprefix("mesh.") for word in plan["words"] if word.startswith("mesh."))
    where = name.partition(" on ")[2] or f"{plan['words'][plan['words'].index('--topology') + 1]}"
    if "failed" in plan:
        return f"| {where} | {mesh} | {plan['failed']} |" + " |" * (len(HEADS) - 3)
    steps = {key: step for key, step in plan["steps"].items() if "peak" in step}
    most = max(steps, key=lambda key: steps[key]["peak"], default="")
    peak = steps[most]["peak"] if most else 0
    online = next((stage for stage in ("ppo", "grpo") if f"{stage}/update" in plan["steps"]), "")
    update = plan["steps"].get(f"{online}/update", {})
    step = plan.get("stages", {}).get(online, {}).get("step_seconds", {}).get("expected")
    hours = plan.get("device_hours", {}).get("expected")
    cells = (
        where, mesh, "yes" if plan["fits"] else "no", most, f"{peak / 2**30:.1f}",
        f"{1 - peak / plan['chip']['memory']:.0%}", duration(step) if step and plan["fits"] else "",
        f"{update['mfu']:.0%}" if update.get("mfu") else "", f"{hours:,.0f}" if hours and plan["fits"] else "",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write_page(results: dict[str, Any]) -> None:
    """The tables of docs/scale.md, between their marks."""
    lines = []
    for recipe in (*RECIPES, "weak"):
        own = [name for name in cases() if name in results and name.startswith((f"{recipe} on", f"{recipe}/"))]
        if own:
            title = "Weak scaling of llama3_8b_ppo" if recipe == "weak" else recipe
            lines += ["", f"### {title}", "", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
            lines += [line(name, results[name]) for name in own]
            lines += [f"\n{name.partition(' on ')[2]}: {plan['reasons'][0]}" + _remedy(plan) for name in own
                      if (plan := results[name]).get("reasons")]  # fmt: skip
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(
        f"{before}{BEGIN}\n" + "\n".join(lines).lstrip("\n") + f"\n\n{END}{rest.partition(END)[2]}", "utf-8"
    )


def _remedy(plan: dict[str, Any]) -> str:
    return "".join(f"; `{' '.join(one['overrides'])}` does ({one['said']})" for one in plan["remedies"][:1])


if __name__ == "__main__":
    main()
