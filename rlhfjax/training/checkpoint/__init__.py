"""Checkpoints: the only place that knows Orbax.

A step directory holds one item per model (`policy`, `value`, `reward`, `average`), so that each can be read alone, the
`training` state, and `meta`: what is needed to build the models again, with the tokenizer. In each lies a manifest of
every file's digest and every array's, and one of these manifests in the step: what is read is verified, and no more.
"""

from rlhfjax.training.checkpoint.items import stored_digests
from rlhfjax.training.checkpoint.leaves import open_leaves
from rlhfjax.training.checkpoint.meta import (
    COMPLETE,
    FORMAT,
    SCALAR,
    find_checkpoint,
    meta_of,
    read_meta,
    tokenizer_of,
)
from rlhfjax.training.checkpoint.models import Bases, load_model, model_shapes, reference_to, save_model, tree_digest
from rlhfjax.training.checkpoint.saving import Checkpoints, Restored
from rlhfjax.training.checkpoint.steps import require_writable
from rlhfjax.training.checkpoint.streamed import save_leaves

__all__ = [
    "COMPLETE",
    "FORMAT",
    "SCALAR",
    "Bases",
    "Checkpoints",
    "Restored",
    "find_checkpoint",
    "load_model",
    "meta_of",
    "model_shapes",
    "open_leaves",
    "read_meta",
    "reference_to",
    "require_writable",
    "save_leaves",
    "save_model",
    "stored_digests",
    "tokenizer_of",
    "tree_digest",
]
