"""The proof that an export is the model that it was made from: it has the same bits, and computes the same.

The export is read back by the path that imports models, so names, shapes, transposes, types and configuration are in
the comparison. Both models are computed in step, a layer of one and then of the other in the same memory, and between
the two each parameter of the export is compared, bit for bit, with the checkpoint's in the type that it was written in.
How close numbers have to be follows from that type.
"""

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from rlhfjax.errors import IntegrityError
from rlhfjax.interop.pretrained import Imported, Pretrained
from rlhfjax.interop.safetensors_files import STORED, cast
from rlhfjax.leaves import Leaves, Region, empty, fill, put, region_at, shape_of
from rlhfjax.models import DecoderConfig
from rlhfjax.models.layerwise import Layerwise
from rlhfjax.types import Params

SEED = 0
ROWS, LENGTH = 4, 32
# Largest difference, as a share of the largest magnitude: rounding of the weights, through all layers. Equal weights
# leave only the order of sums, which differs where a bias was folded away. What eight bits do is the model's affair.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1, "q8_0": math.inf}
_PART = 1 << 29  # bytes of a vocabulary that are in memory at a time
Both = tuple[Any, Any]  # the same of the checkpoint and of the export
Same = Callable[[str, np.ndarray, np.ndarray], bool]  # of a path: whether an export holds what was to be written


def probe(config: DecoderConfig) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Tokens of a fixed seed and the mask of their lengths, padding on the right."""
    length = min(LENGTH, config.context)
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, (ROWS, length), dtype=np.int32)
    lengths = np.array([length, length, max(length // 2, 1), 1])
    return tokens, np.arange(length)[None, :] < lengths[:, None]


class Proof:
    """A checkpoint's model and its export. `found` is what both computed, logits on real tokens or scores.

    `own` are the leaves of the model, `written` the same as they were to be written, where some were changed. Raises
    IntegrityError where a parameter of the export is not the `same`, or is not there.
    """

    def __init__(self, config: DecoderConfig, own: Leaves, written: Leaves, source: Pretrained, same: Same):
        self._own, self._written, self._imported, self._same = own, written, Imported(source), same
        self._config, self._shapes = config, written.shapes
        self._held: dict[str, np.ndarray] = {}
        self._compared = dict.fromkeys(self._shapes, 0)
        tokens, mask = probe(config)
        self._mask, self._models = (
            mask,
            (Layerwise(config, jax.numpy.asarray(mask)), Layerwise(source.config, jax.numpy.asarray(mask))),
        )
        self.found = self._outputs(tokens)
        for path, shape in self._shapes.items():
            if self._compared[path] < math.prod(shape):
                raise IntegrityError(f"export: expected all of {path} to be read back, got a part; nothing was written")

    def _outputs(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = self._begin(tokens)
        inner = [path for path in self._shapes if path.startswith("blocks/")]
        for number in range(self._config.layers):
            regions = {path: region_at(self._shapes[path], (number,)) for path in inner}
            x = self._in_step(regions, partial(self._layer, number), x)
        norm = [path for path in self._shapes if path.startswith("final_norm/")]
        whole = {path: region_at(self._shapes[path]) for path in norm}
        hidden = self._in_step(whole, lambda model, params, x: model.end(params, x), x)
        if "head/kernel" in self._shapes:
            head = {path: region_at(self._shapes[path]) for path in ("head/kernel", "head/bias")}
            scores = self._in_step(head, lambda model, params, x: model.scores(params["head"], x), hidden)
            return np.asarray(scores[0]), np.asarray(scores[1])
        return self._logits(hidden)

    def _begin(self, tokens: np.ndarray) -> Both:
        """What the first layers read; only rows of the table that the probe has are kept."""
        known, numbers = np.unique(tokens, return_inverse=True)
        tables: list[dict[str, Any]] = [{}, {}]
        for name in ("embed", "positions"):
            path = f"{name}/embedding"
            if path not in self._shapes:
                continue
            chosen = known if name == "embed" else np.arange(tokens.shape[1])
            rows = [np.zeros((len(chosen), self._shapes[path][1]), np.float32) for _ in range(2)]
            for region in self._parts(path, 0):
                here = np.flatnonzero((region[0].start <= chosen) & (chosen < region[0].stop))
                places = chosen[here] - region[0].start
                picked = self._in_step({path: region}, partial(_rows, name, places), (None, None))
                for table, part in zip(rows, picked, strict=True):
                    table[here] = part
            for table, own in zip(tables, rows, strict=True):
                table[name] = {"embedding": own}
        numbered = numbers.reshape(tokens.shape).astype(np.int32)
        one, other = (
            model.begin(table, jax.numpy.asarray(numbered)) for model, table in zip(self._models, tables, strict=True)
        )
        return one, other

    def _logits(self, hidden: Both) -> tuple[np.ndarray, np.ndarray]:
        path, axis = ("embed/embedding", 0) if self._config.tied else ("unembed/kernel", 1)
        hidden = np.asarray(hidden[0])[self._mask], np.asarray(hidden[1])[self._mask]
        made = [np.empty((len(hidden[0]), self._config.vocab_size), np.float32) for _ in range(2)]
        for region in self._parts(path, axis):
            logits = self._in_step({path: region}, lambda model, params, x: model.logits(params, x), hidden)
            for all_of_them, some in zip(made, logits, strict=True):
                all_of_them[:, region[axis]] = some
        return made[0].reshape(-1), made[1].reshape(-1)

    def _layer(self, number: int, model: Layerwise, params: Params, x: Any) -> Any:
        layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        return model.layer(number, layer, x)

    def _parts(self, path: str, axis: int) -> list[Region]:
        """All of a matrix, in parts along an axis."""
        shape = self._shapes[path]
        step = max(_PART * shape[axis] // (4 * math.prod(shape)), 1)
        starts = range(0, shape[axis], step)
        whole = region_at(shape)
        return [(*whole[:axis], slice(start, min(start + step, shape[axis])), *whole[axis + 1 :]) for start in starts]

    def _in_step(self, regions: Mapping[str, Region], apply: Callable[..., Any], x: Both) -> Both:
        """`apply(model, parameters, x)` of the checkpoint, then of the export, whose parameters take their places."""
        arrays = self._memory(regions)
        for path, region in regions.items():
            fill(arrays[path], self._own, path, region)
        params = _nested(arrays)
        # Arrays are computed with where they lie, so they must not change before that is done.
        own = jax.block_until_ready(apply(self._models[0], params, x[0]))
        for path, region in regions.items():
            self._exchange(path, region, arrays[path])
        return own, jax.block_until_ready(apply(self._models[1], params, x[1]))

    def _memory(self, regions: Mapping[str, Region]) -> dict[str, np.ndarray]:
        """Room for the regions. Those of one layer after another have the same, which jax may let go of late."""
        shapes = {path: shape_of(region) for path, region in regions.items()}
        if {path: array.shape for path, array in self._held.items()} != shapes:
            self._held = {}
            self._held = {path: empty(shape, np.float32) for path, shape in shapes.items()}
        return self._held

    def _exchange(self, path: str, region: Region, array: np.ndarray) -> None:
        """Put the export's numbers in the place of the checkpoint's, after both were compared."""
        if self._written is not self._own:
            fill(array, self._written, path, region)
        for where, block in self._imported.blocks(path, region):
            expected, block = array[where], _straight(block)
            if not self._same(path, expected, block):
                raise IntegrityError(
                    f"export: expected {path} as the checkpoint has it after reading it back, got something else; "
                    "nothing was written"
                )
            array[where] = block
            self._compared[path] += block.size


def same_bits(dtype: str) -> Same:
    """Of parameters that are written in this type."""

    def same(path: str, expected: np.ndarray, block: np.ndarray) -> bool:
        if path.startswith("head/"):  # its bias has no tensor, but a number of config.json
            return np.array_equal(expected.astype(dtype), block.astype(dtype))
        return np.array_equal(_bits(cast(expected, STORED[dtype], path)), _bits(block))

    return same


def _rows(name: str, places: np.ndarray, _: Layerwise, params: Params, __: Any) -> np.ndarray:
    return params[name]["embedding"][places]


def _straight(block: np.ndarray) -> np.ndarray:
    """A block that lies as our parameters do."""
    if (block := np.asarray(block)).flags.c_contiguous:
        return block
    made = np.empty(block.shape, block.dtype)
    put(made, block)
    return made


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _nested(arrays: Mapping[str, np.ndarray]) -> Params:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = array
    return tree


def compared(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"], dtype: str, scalar: bool) -> dict[str, Any]:
    """What a certificate says of the outputs of both.

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
        "compared": f"every parameter, bit for bit, with the checkpoint's in {dtype}; {what}s of the checkpoint with "
        "those of this directory read back, float32 arithmetic",
        "inputs": {"seed": SEED, "rows": ROWS, "length": LENGTH, "padding": "right"},
        "dtype": dtype,
        f"max_abs_{what}_difference": difference,
        f"max_abs_{what}": scale,
        "tolerance": tolerance,
        "versions": {name: importlib.metadata.version(name) for name in ("rlhfjax", "jax", "flax", "numpy")},
    }
