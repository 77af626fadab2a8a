"""The run configuration: schema, strict loading, and arithmetic checked before any device work. Imports no jax."""

from rlhfjax.config.arithmetic import (
    check,
    check_updates,
    guessing_heads,
    needs_documents,
)
from rlhfjax.config.description import describe
from rlhfjax.config.loading import (
    config_hash,
    config_path,
    json_schema,
    key_sources,
    load_config,
    resolved,
    resolved_yaml,
    shipped,
)
from rlhfjax.config.meshes import least_devices, mesh_problems, mesh_shape, sequence_lengths
from rlhfjax.config.schema import Run

__all__ = [
    "Run",
    "check",
    "check_updates",
    "config_hash",
    "config_path",
    "describe",
    "guessing_heads",
    "json_schema",
    "key_sources",
    "least_devices",
    "load_config",
    "mesh_problems",
    "mesh_shape",
    "needs_documents",
    "resolved",
    "resolved_yaml",
    "sequence_lengths",
    "shipped",
]
