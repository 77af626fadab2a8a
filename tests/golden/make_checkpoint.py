"""A small run of a released version, as that version wrote it: what every later version must still read and continue.

Run it with the version that is to be kept, on a CPU, and commit what it writes:

    python tests/golden/make_checkpoint.py tests/golden/checkpoints/NAME

The run stands at step 2 of 4 of its only stage. `expected.npz` has the logits and the greedy text of the policy there,
and what the parameters became when the same version went on to step 4.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from typer.testing import CliRunner

import rlhfjax
from rlhfjax.cli import app

TOKENS = np.asarray([[5, 9, 33, 17], [40, 21, 8, 2]], np.int32)
PROMPT = "the film"
_WORDS = ["the", "film", "story", "ending", "music", "was", "is", "and", "a", "very", "good", "bad", "cold", "warm"]

RECIPE = {
    "name": "kept",
    "seed": 3,
    "data_dir": "prepared",
    "model": {"layers": 1, "width": 8, "heads": 2, "mlp_width": 16, "context": 32},
    "tokenizer": {"vocab_size": 300, "data": [{"source": "documents.jsonl"}]},
    "stages": {
        "pretrain": {
            "data": [{"source": "documents.jsonl"}],
            "batch": {"size": 4, "length": 16},
            "steps": 4,
            "optimizer": {"lr": 3e-3, "warmup_steps": 1},
            "validate_every": 2,
        }
    },
    "checkpoints": {"every": 2, "keep": 2},
    "logging": {"tensorboard": False},
}


def by_path(params) -> dict[str, np.ndarray]:
    """The leaves of a tree as numpy arrays, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def make(target: Path) -> None:
    """Write `target`: recipe.yaml, documents.jsonl, run/ and expected.npz."""
    target = target.absolute()
    with tempfile.TemporaryDirectory() as work:  # Orbax writes paths into its files
        os.chdir(work)
        _run()
        shutil.copytree(work, target)


def _run() -> None:
    draw = np.random.default_rng(7)
    texts = (" ".join(draw.choice(_WORDS, draw.integers(2, 30))) for _ in range(40))
    Path("documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    Path("recipe.yaml").write_text(json.dumps(RECIPE, indent=1), encoding="utf-8")
    done = CliRunner().invoke(app, ["run", "recipe.yaml", "--run-dir", "run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    end = by_path(rlhfjax.load("run").params)
    shutil.rmtree("run/pretrain/checkpoints/4")
    Path("run/pretrain/complete.json").unlink()
    shutil.rmtree("prepared")
    Path("run/manifest.jsonl").unlink()  # it says where and on what machine
    model = rlhfjax.load("run")
    [[completion]] = model.generate([PROMPT], max_new_tokens=8, temperature=0.0)
    told = {"logits": np.asarray(model.logits(TOKENS)), "text": np.asarray(completion.text)}
    np.savez_compressed("expected.npz", **told, **{f"end/{path}": leaf for path, leaf in end.items()})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
