"""A model with adapters, read as the one that they are merged into."""

from collections.abc import Iterator

import numpy as np

from rlhfjax.leaves import Leaves, Region, inside, read, region_at
from rlhfjax.models.lora import LEAVES, merge


class Merged:
    """Leaves of a model without adapters, whose kernels have those of another one added (`merge`).

    A kernel with adapters is computed a layer at a time, and is three times in memory then.
    """

    def __init__(self, leaves: Leaves, alpha: float):
        self._leaves, self._alpha, self.check = leaves, alpha, leaves.check
        self.shapes = {path: shape for path, shape in leaves.shapes.items() if not path.endswith(LEAVES)}

    def blocks(self, path: str, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        beside = [path.rpartition("/")[0] + "/" + name for name in LEAVES]
        if not path.endswith("/kernel") or beside[0] not in self._leaves.shapes:
            yield from self._leaves.blocks(path, region)
            return
        lead = int("blocks" in path.split("/"))  # the axis of layers, which adapters have as well
        for place in np.ndindex(*(part.stop - part.start for part in region[:lead])):
            at = [part.start + i for part, i in zip(region, place, strict=False)]
            read_at = [read(self._leaves, name, region_at(self._leaves.shapes[name], at)) for name in (path, *beside)]
            merged = np.asarray(merge(dict(zip(("kernel", *LEAVES), read_at, strict=True)), self._alpha)["kernel"])
            where = (*(slice(i, i + 1) for i in at), *region[lead:])
            yield inside(region, where), merged[(slice(None),) * lead + region[lead:]]
