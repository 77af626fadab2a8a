"""Adapters as a directory that `peft.PeftModel.from_pretrained(base, directory)` loads.

There an adapter of a linear with the matrix W [out, in] is `lora_A` [r, in] and `lora_B` [out, r], and adds
(α/r)·B·A to W; of a linear that is stored as [in, out] it adds the transpose (`fan_in_fan_out`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.interop.families import Weight, weights
from rlhfjax.interop.pretrained import names_of
from rlhfjax.interop.safetensors_files import write_file
from rlhfjax.interop.tensors import tensor_of
from rlhfjax.interop.whole_directories import whole_directory
from rlhfjax.models import LanguageModel, SequenceModel
from rlhfjax.models.lora import LEAVES, has_adapters
from rlhfjax.types import Params

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_adapters(target: Path, model: SequenceModel, params: Params, *, force: bool = False) -> None:
    """Write the adapters of a policy, float32; its base is a directory of its own, such as the one that it came from.

    Raises ConfigError for a model without adapters, a scalar model, and a family that stores a linear with adapters
    together with others.
    """
    if not isinstance(model, LanguageModel) or "head" in params or not has_adapters(params):
        got = "a scalar model" if "head" in params else "one without; export it as a whole"
        raise ConfigError(f"export --adapters: expected a policy with adapters, got {got}")
    tensors: dict[str, np.ndarray] = {}
    modules, transposed, ranks = set(), set(), set()
    for weight, leaves in _adapted(model, params):
        for place, name in names_of(weight, model.config):
            a, b = (np.asarray(leaves[leaf])[place] for leaf in LEAVES)
            down, up = a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T
            transposed.add(_is_transposed(weight, (*a.shape[:-1], *b.shape[1:]), (up.shape[0], down.shape[1])))
            module = name.removesuffix(".weight")
            tensors |= {
                f"base_model.model.{module}.lora_A.weight": down,
                f"base_model.model.{module}.lora_B.weight": up,
            }
            modules.add(".".join(module.split(".")[-2:]))
            ranks.add(a.shape[-1])
    settings = _settings(ranks.pop(), model.config.lora_alpha, sorted(modules), transposed.pop())
    with whole_directory(target, SETTINGS, force) as part:
        shapes = {name: ("F32", array.shape) for name, array in tensors.items()}
        write_file(part / TENSORS, shapes, tensors.items())
        (part / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _adapted(model: LanguageModel, params: Params) -> Iterator[tuple[Weight, Params]]:
    """The weights of linears that hold adapters, and what they hold."""
    for weight in weights(model.config):
        leaves: Any = params
        for name in weight.path.split("/")[:-1]:
            leaves = leaves.get(name, {})
        if weight.path.endswith("/kernel") and "lora_a" in leaves:
            yield weight, leaves


def _is_transposed(weight: Weight, ours: tuple[int, ...], theirs: tuple[int, int]) -> bool:
    """Whether the family stores [in, out]; ConfigError when it stores other linears in the same tensor."""
    probe = np.arange(theirs[0] * theirs[1], dtype=np.float32)
    matrix = probe.reshape(theirs[::-1])
    stored = None if weight.shared else tensor_of([weight], [probe.reshape(ours)])
    transposed = stored is not None and np.array_equal(stored, matrix)
    if stored is None or not (transposed or np.array_equal(stored, matrix.T)):
        raise ConfigError(
            f"export --adapters: {weight.name} holds more than {weight.path}, so it cannot take its adapters alone; "
            "export the model as a whole"
        )
    return transposed


def _settings(rank: int, alpha: float, modules: list[str], transposed: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
