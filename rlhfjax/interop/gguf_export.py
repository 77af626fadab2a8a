"""A policy as one GGUF file, for llama.cpp and what stands on it: weights, settings, tokenizer, chat template, lineage.

The file is written a tensor at a time by the package `gguf`, and read back by the path that imports such files: its
configuration and tokenizer have to be the same, its numbers within what their type rounds, and so its logits.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.integrity import sync
from rlhfjax.interop.exporting import as_there
from rlhfjax.interop.families import config_of, hf_config
from rlhfjax.interop.gguf import as_in_file, name_in_file, open_gguf, transposed
from rlhfjax.interop.gguf_files import GgufFile, GgufTensor
from rlhfjax.interop.gguf_settings import described, metadata_of
from rlhfjax.interop.gguf_vocabulary import vocabulary_of
from rlhfjax.interop.parity import Proof, Same, compared
from rlhfjax.interop.weight_files import Plan
from rlhfjax.leaves import Leaves
from rlhfjax.models import DecoderConfig, SequenceModel
from rlhfjax.text.loading import AnyTokenizer

SUFFIX = ".gguf"
# Names of --quantize: what `parity.TOLERANCE` calls it, and the number of llama.cpp's file type.
TYPES = {"f32": ("float32", 0), "f16": ("float16", 1), "q8_0": ("q8_0", 7)}
LINEAGE = "rlhfjax.lineage"
_BLOCK = 32  # weights that share a scale in q8_0
_AT_ONCE = 1 << 22  # numbers that are converted at a time


def export_gguf(
    target: Path, model: SequenceModel, leaves: Leaves, tokenizer: AnyTokenizer | None, *,
    quantize: str = "f32", force: bool = False, lineage: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `target`, read it back, compare, and return what was found; adapters are merged first.

    Matrices are stored as `quantize` says, vectors and positions in float32. Raises ConfigError for what GGUF has no
    words for (a family, a setting, a tokenizer) or a target that is taken, IntegrityError where what was read back is
    or computes something else; then nothing is written.
    """
    if os.path.lexists(target) and not (force and target.is_file() and not target.is_symlink()):
        raise ConfigError(f"{target}: exists already; choose another path, or --force to replace the file")
    if quantize not in TYPES:
        raise ConfigError(f"--quantize: expected {', '.join(TYPES)}, got {quantize!r}")
    if "head/kernel" in leaves.shapes:
        raise ConfigError("export: expected a policy to write as GGUF, got a model of scores; name another --item")
    told = dict(lineage or {})
    model, leaves = as_there(model, leaves, told)
    file = _File(model.config, Plan(model.config, leaves, "float32", 1 << 62), quantize)
    dtype, number = TYPES[quantize]
    words = {"general.name": target.stem, "general.file_type": number, "general.quantization_version": 2}
    words |= {LINEAGE: json.dumps(told, ensure_ascii=False)}
    words |= vocabulary_of(tokenizer, model.config.vocab_size) if tokenizer else {"tokenizer.ggml.model": "none"}
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file.write(part, words)
        leaves.check()
        proof = Proof(model.config, leaves, leaves, open_gguf(part), _close(quantize))
        found = compared(*proof.found, dtype, scalar=False)
        part.chmod(0o600)
        os.replace(part, target)
        sync(target.parent)
    except OSError as error:
        raise ConfigError(f"{target}: could not be written: {error.strerror}; make room, or choose a path") from error
    finally:
        with suppress(OSError):
            part.unlink()
    return found


class _File:
    """The tensors of a file: their names, shapes and types, and the settings that they come with."""

    def __init__(self, config: DecoderConfig, plan: Plan, quantize: str):
        hf = hf_config(config)
        self.architecture, self._settings = metadata_of(hf)
        self._config, self._plan = config, plan
        [tensors] = plan.files.values()
        self._names = {name: name_in_file(name, self.architecture) for name in tensors}
        self._shapes = {
            name: shape[::-1] if transposed(name, self.architecture) else tuple(shape)
            for name, (_, shape) in tensors.items()
        }
        self._types = {name: _type_of(name, self._shapes[name], quantize) for name in tensors}
        self._require_the_same(hf)

    def _require_the_same(self, hf: Mapping[str, Any]) -> None:
        """The settings, read back, are this model's; else GGUF has no word for one of them."""
        metadata = {f"{self.architecture}.{key}": value for key, value in self._settings.items()}
        tensors = {self._names[name]: GgufTensor(shape, 0, 0, 0) for name, shape in self._shapes.items()}
        again = config_of(described(GgufFile(Path("export"), metadata, tensors, None), self.architecture))  # type: ignore[arg-type]
        for key, value in hf_config(replace(again, init_std=self._config.init_std)).items():
            if hf.get(key) != value and key not in ("architectures", "model_type"):
                raise ConfigError(
                    f"export: expected a model that GGUF has words for, got {key} {hf.get(key)!r} where a file of "
                    f"{self.architecture} means {value!r}; export it as a Hugging Face directory"
                )

    def write(self, path: Path, words: Mapping[str, Any]) -> None:
        """All of it, with other metadata. No more than a tensor, in float32 and as stored, is in memory."""
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self._settings.items():
            _add(writer, f"{self.architecture}.{key}", value)
        for key, value in words.items():
            _add(writer, key, value)
        for name, stored in self._types.items():
            kind = gguf.GGMLQuantizationType[stored]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count = math.prod(self._shapes[name]) // block * size
            writer.add_tensor_info(self._names[name], self._shapes[name], np.dtype(np.float32), count, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, stored in self._types.items():
                tensor = as_in_file(self._plan.tensor(name), name, self.architecture, self._config)
                writer.write_tensor_data(_stored(tensor, gguf.GGMLQuantizationType[stored]))
            for out in writer.fout or ():
                out.flush()
                os.fsync(out.fileno())
        finally:
            writer.close()


def _type_of(name: str, shape: tuple[int, ...], quantize: str) -> str:
    """Vectors and positions are small, and in float32 in every file; q8_0 needs whole blocks."""
    if len(shape) == 1 or "wpe" in name or quantize == "f32":
        return "F32"
    return "Q8_0" if quantize == "q8_0" and shape[-1] % _BLOCK == 0 else "F16"


def _stored(tensor: np.ndarray, kind: Any) -> np.ndarray:
    """The bytes of a float32 tensor, a part of its rows at a time."""
    import gguf

    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(_AT_ONCE // rows.shape[1], 1)
    parts = (np.ascontiguousarray(rows[at : at + step], np.float32) for at in range(0, len(rows), step))
    first = gguf.quants.quantize(np.ascontiguousarray(rows[:1], np.float32), kind)
    made = np.empty((len(rows), first.shape[-1]), first.dtype)
    for at, part in zip(range(0, len(rows), step), parts, strict=True):
        made[at : at + step] = gguf.quants.quantize(part, kind)
    return made


def _add(writer: Any, key: str, value: Any) -> None:
    """A number as llama.cpp's own converter types it."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[list] = writer.add_array
    kinds[type(value)](key, value)


def _close(quantize: str) -> Same:
    """Whether numbers that were read back are the model's but for what their type rounds."""

    def same(path: str, expected: np.ndarray, block: np.ndarray) -> bool:
        expected, block = expected.astype(np.float64), block.astype(np.float64)
        bound = 2.0**-23 * (1 + np.abs(expected))  # 1 + w − 1, of Gemma's norms
        if quantize == "f16":
            bound = bound + 2.0**-11 * np.abs(expected)
        elif quantize == "q8_0":  # half a step, and the scale, which is a float16
            bound = bound + 0.57 / 127 * np.abs(expected).max(initial=0)
        return bool((np.abs(expected - block) <= bound).all())

    return same
