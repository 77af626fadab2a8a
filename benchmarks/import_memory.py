"""The most memory that an import needs beyond what the imported modules take, as a share of the model in float32.

    JAX_PLATFORMS=cpu python benchmarks/import_memory.py [SRC]

SRC is what `rlhfjax import` takes; smollm2 if none is given. Pages of mapped files count.
"""

import resource
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import rlhfjax
from rlhfjax.interop import gguf, known  # noqa: F401  imported before, so that they are not counted
from rlhfjax.transfer import import_model


def largest() -> int:
    """Bytes of the process at its largest (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    jnp.zeros(1).block_until_ready()
    before = largest()
    with tempfile.TemporaryDirectory() as folder:
        import_model(source, Path(folder) / "model", dtype="float32", force=False, report=print)
        needed = largest() - before
        size = 4 * sum(leaf.size for leaf in jax.tree.leaves(rlhfjax.load(Path(folder) / "model").params))
    print(f"{needed / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB: {needed / size:.2f} x")


if __name__ == "__main__":
    main()
