"""The proof that an export is the model that it was made from: both compute the same on the same tokens.

The export is read back by the path that imports models, so names, shapes, transposes, types and configuration are in
the comparison. How close numbers have to be follows from the type that the weights were rounded to.
"""

import hashlib
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhfjax.errors import IntegrityError
from rlhfjax.models import DecoderConfig, LanguageModel
from rlhfjax.types import Params

SEED = 0
ROWS, LENGTH = 4, 32
# Largest difference, as a share of the largest magnitude: rounding of the weights, through all layers. Equal weights
# leave only the order of sums, which differs where a bias was folded away.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}


def probe(config: DecoderConfig) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Tokens of a fixed seed and the mask of their lengths, padding on the right."""
    length = min(LENGTH, config.context)
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, (ROWS, length), dtype=np.int32)
    lengths = np.array([length, length, max(length // 2, 1), 1])
    return tokens, np.arange(length)[None, :] < lengths[:, None]


def outputs(model: LanguageModel, params: Params) -> Float[np.ndarray, "N"]:
    """Logits on real tokens, or scores, of the probe; computed in float32 whatever the model's own type is."""
    exact = LanguageModel(replace(model.config, dtype="float32", remat="none"))
    tokens, mask = probe(model.config)
    if "head" in params:
        return np.asarray(jax.jit(exact.scores)(params, tokens, mask))
    return np.asarray(jax.jit(exact.logits)(params, tokens, mask))[mask].reshape(-1)


def certificate(
    directory: Path, before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"], dtype: str, scalar: bool
) -> dict[str, Any]:
    """The largest difference, the tolerance, versions, and the SHA-256 of each file.

    Raises IntegrityError when the difference is larger than the tolerance.
    """
    difference, scale = float(np.abs(before - after).max()), float(np.abs(before).max())
    tolerance = TOLERANCE[dtype] * max(scale, 1e-3)
    what = "score" if scalar else "logit"
    if not difference <= tolerance:
        raise IntegrityError(
            f"export: expected {what}s within {tolerance:.2g} of the model's after reading it back, got "
            f"{difference:.2g}; nothing was written"
        )
    return {
        "compared": f"{what}s of the checkpoint with those of this directory read back, float32 arithmetic",
        "inputs": {"seed": SEED, "rows": ROWS, "length": LENGTH, "padding": "right"},
        "dtype": dtype,
        f"max_abs_{what}_difference": difference,
        f"max_abs_{what}": scale,
        "tolerance": tolerance,
        "sha256": {path.name: sha256(path) for path in sorted(directory.iterdir())},
        "versions": {name: importlib.metadata.version(name) for name in ("rlhfjax", "jax", "flax", "numpy")},
    }


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
