"""Directories as others publish them: tiny models of the golden files, written by the library safetensors."""

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
from tiny import stored

from rlhfjax.interop.families import config_of, weights
from rlhfjax.interop.pretrained import names_of

GOLDEN = Path(__file__).parent.parent / "golden" / "families"


def golden(name):
    """What transformers computed, and the configuration it had."""
    data = stored(GOLDEN / f"{name}.npz")
    return data, json.loads(str(data["config"]))


def tensor(name, shape):
    """The value of a tensor, by its name alone, as in make_families.py."""
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return np.random.default_rng(zlib.crc32(name.encode())).normal(mean, 0.25, shape).astype(np.float32)


def tensors_of(described):
    """All tensors of a model, by transformers' names."""
    config, scalar = config_of(described), described["architectures"][0].endswith("SequenceClassification")
    shapes = {name: w.shape for w in weights(config, scalar) for _, name in names_of(w, config)}
    shapes |= {"score.weight": (1, config.width)} if scalar else {}
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def publish(directory, name, tensors=None, **settings):
    """The directory of a golden model; `settings` change its config.json."""
    described = golden(name)[1]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(described | settings))
    save(directory / "model.safetensors", tensors_of(described) if tensors is None else tensors)
    return directory


def save(path, tensors):
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def shard(directory, count=3):
    """The same directory with its weights in several files."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    placed = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save(directory / file, {name: array for name, array in tensors.items() if placed[name] == file})
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
