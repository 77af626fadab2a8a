"""Parameters that nothing trains, in the type in which they are read: half the memory where that is bfloat16."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.lora import has_adapters
from rlhfjax.types import Params

# What every program casts before it reads it. Norms, routers and heads are float32 all the way.
_CAST = re.compile(r"(attention/(query|key|value|out)|mlp/(up|gate|down)|experts/(up|gate|down)|unembed)/kernel$")
_TABLE = re.compile(r"(^|/)embed/embedding$")


def in_compute_type(config: Any, params: Params) -> Params:
    """The same parameters, of arrays or shapes, with matrices in the type of the computation: no result changes.

    With adapters they stay as they are: their base is shared with what trains.
    """
    if not isinstance(config, DecoderConfig) or has_adapters(params):
        return params
    # A table that is scaled is scaled in float32.
    plain = config.input_scale == 1 and config.logit_divisor == 1 and config.positions != "learned"

    def cast(path: tuple, leaf: Any) -> Any:
        name = "/".join(str(entry.key) for entry in path)
        if leaf.dtype != jnp.float32 or not (_CAST.search(name) or (plain and _TABLE.search(name))):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, config.compute_dtype, sharding=leaf.sharding)
        return leaf.astype(config.compute_dtype)

    if config.compute_dtype == jnp.float32:
        return params
    return jax.tree_util.tree_map_with_path(cast, params)
