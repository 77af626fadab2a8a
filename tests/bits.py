"""Compares the bits of two checkouts: `python tests/bits.py OLD NEW FOLDER`.

Each checkout runs four recipes in miniature: on one device, on 2 x 2 x 2 devices, with adapters, and with DPO. Metrics
but for times, samples, the digests of every parameter and moment, and the evaluation must be equal; what differs is
listed, and the exit code is 1. FOLDER keeps the runs of OLD: many changes can be compared with one old checkout.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from stages.tiny_recipe import recipe, write_files

from rlhfjax.runs.comparison import first_differences

LORA = {"rank": 2, "alpha": 8.0, "targets": ["attention/(query|value)", "mlp/up"]}


def recipes(files: Path) -> dict[str, dict]:
    """Configurations by name."""
    plain = recipe(files)
    stages = plain["stages"]
    dpo = {name: value for name, value in stages["reward"].items() if name != "normalize"}
    return {
        "plain": plain,
        "mesh": plain | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
        "lora": plain | {"model": plain["model"] | {"lora": LORA}},
        "dpo": plain | {"stages": {"pretrain": stages["pretrain"], "sft": stages["sft"], "dpo": dpo}},
    }


def run(checkout: Path, config: Path, run_dir: Path, devices: int) -> None:
    """A recipe from its start, by the command line of a checkout."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    words = [sys.executable, "-m", "rlhfjax.cli", "run", str(config), "--run-dir", str(run_dir)]
    done = subprocess.run(words, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}, {config.stem}: exit {done.returncode}\n{done.stderr}")


def main(old: Path, new: Path, folder: Path) -> int:
    """How many stages differ, over all recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    files, differences = write_files(folder), 0
    for name, settings in recipes(files).items():
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(settings), encoding="utf-8")
        devices = 8 if name == "mesh" else 1
        if not (folder / "old" / f"{name}.done").exists():
            shutil.rmtree(folder / "old" / name, ignore_errors=True)
            run(old, config, folder / "old" / name, devices)
            (folder / "old" / f"{name}.done").touch()
        shutil.rmtree(folder / "new" / name, ignore_errors=True)
        run(new, config, folder / "new" / name, devices)
        found = first_differences(folder / "old" / name, folder / "new" / name, ["tokenizer", *settings["stages"]])
        differences += len(found)
        print(f"{name}: {'equal' if not found else ''}", *found, sep="\n  " if found else "", flush=True)
    return differences


if __name__ == "__main__":
    sys.exit(bool(main(*(Path(word).resolve() for word in sys.argv[1:]))))
