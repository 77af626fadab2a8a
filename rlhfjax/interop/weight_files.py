"""The weights of an export: which tensors there are, how they are shared out over files, and each file as written."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.interop.families import Weight, weights
from rlhfjax.interop.huggingface import HEAD, WEIGHTS
from rlhfjax.interop.pretrained import names_of
from rlhfjax.interop.safetensors_files import DTYPES, STORED, Entry, Written, cast, write_file
from rlhfjax.leaves import Leaves, put, read, region_at
from rlhfjax.models import DecoderConfig

Files = Mapping[str, Mapping[str, Entry]]  # the tensors of each file


class Plan:
    """The files of the weights of a model. They follow from its shapes alone, so several processes can share them."""

    def __init__(self, config: DecoderConfig, leaves: Leaves, dtype: str, shard_size: int):
        self._leaves, self._dtype = leaves, dtype
        self._sources: dict[str, tuple[tuple[int, ...], list[Weight]]] = {}
        scalar = "head/kernel" in leaves.shapes
        groups: dict[str, list[Weight]] = {}
        for weight in weights(config, scalar):
            groups.setdefault(weight.name, []).append(weight)
        sizes: dict[str, Entry] = {}
        for group in groups.values():
            for place, name in names_of(group[0], config):
                sizes[name], self._sources[name] = (STORED[dtype], group[0].shape), (place, group)
        if scalar:
            sizes[HEAD] = (STORED[dtype], (1, config.width))
        shards = _shards(sizes, shard_size)
        several = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
        self.files: Files = {WEIGHTS: sizes} if len(shards) == 1 else several

    def write(self, part: Path, file: str) -> Written:
        """One of the files. No more than the tensor that is being written, and a block, is in memory."""
        return write_file(part / file, self.files[file], self._produced(file))

    def _produced(self, file: str) -> Iterator[tuple[str, np.ndarray]]:
        for name in self.files[file]:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as it is stored, filled a block at a time."""
        stored, leaves = STORED[self._dtype], self._leaves
        if name == HEAD:
            return cast(read(leaves, "head/kernel")[None], stored, name)
        place, group = self._sources[name]
        made = np.empty(group[0].shape, DTYPES[stored])
        for weight in group:
            ours = weight.look(made)[(None,) * len(place)]
            for where, block in leaves.blocks(weight.path, region_at(leaves.shapes[weight.path], place)):
                put(ours[(*where, ...)], cast(block, stored, name))
        return made

    def index(self) -> str | None:
        """The text of the index, where there are several files."""
        if len(self.files) == 1:
            return None
        total = sum(_bytes(entry) for shard in self.files.values() for entry in shard.values())
        placed = {name: file for file, shard in self.files.items() for name in shard}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2) + "\n"

    def certified(self, written: Mapping[str, Written]) -> dict[str, Any]:
        """What the certificate says of the files: digests of their headers, and of every tensor with its place."""
        tensors = {}
        for file, shard in self.files.items():
            for name, (dtype, shape) in shard.items():
                digest = written[file].tensors[name]
                tensors[name] = {"file": file, "dtype": dtype, "shape": list(shape), "sha256": digest}
        return {"headers": {file: written[file].header for file in self.files}, "tensors": tensors}


def to_json(written: Mapping[str, Written]) -> str:
    """What one process wrote, for another."""
    return json.dumps({file: asdict(one) for file, one in written.items()})


def from_json(text: str) -> dict[str, Written]:
    """The inverse of `to_json`."""
    return {file: Written(**fields) for file, fields in json.loads(text).items()}


def _shards(sizes: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one has a shard of its own."""
    shards, filled = [{}], 0
    for name, entry in sizes.items():
        if shards[-1] and filled + _bytes(entry) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _bytes(entry)
    return shards


def _bytes(entry: Entry) -> int:
    return math.prod(entry[1]) * DTYPES[entry[0]].itemsize
