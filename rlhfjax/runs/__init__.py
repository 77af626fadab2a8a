"""A run: its directory, its manifest, its checks, the order of its stages, and whether it can be done again."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rlhfjax.config import Run
from rlhfjax.runs.recipe import run_recipe

__all__ = ["inspect_batch", "run_recipe"]


def inspect_batch(
    run: Run, stage: str, run_dir: Path, index: int = 0, report: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Lines that show one row of a stage's batches token by token; see rlhfjax.runs.inspect."""
    from rlhfjax.runs import inspect  # jax is imported only when it is needed

    return inspect.inspect_batch(run, stage, run_dir, index, report)
