"""rlhfjax: the whole InstructGPT recipe in JAX.

`rlhfjax.load(CHECKPOINT)` gives a model with `logits`, `generate` and `score`. `rlhfjax.functional` holds the
equations. The command line is `rlhfjax --help`.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("rlhfjax")
except PackageNotFoundError:  # a checkout on PYTHONPATH that nobody installed
    __version__ = "0+checkout"
__all__ = ["Completion", "Model", "__version__", "functional", "load"]

if TYPE_CHECKING:
    from rlhfjax import functional
    from rlhfjax.api import Completion, Model, load


def __getattr__(name: str) -> Any:
    # jax takes seconds to import, which `rlhfjax --help` does not need.
    import importlib

    if name == "functional":
        return importlib.import_module("rlhfjax.functional")
    if name in ("Completion", "Model", "load"):
        return getattr(importlib.import_module("rlhfjax.api"), name)
    raise AttributeError(f"module 'rlhfjax' has no attribute {name!r}")
