"""Rewards that are found on the host: rules, functions and commands, beside the device and apart from its process.

`Example` is what a reward sees, `Rewards` the rewards of a stage at work. Nothing here imports jax.
"""

from typing import TYPE_CHECKING, Any

from rlhfjax.rewards.example import Example

__all__ = ["Example", "Pending", "Rewards", "Scores", "digests_of", "facts_of", "refuse_other_code"]

if TYPE_CHECKING:
    from rlhfjax.rewards.code import digests_of, facts_of, refuse_other_code
    from rlhfjax.rewards.scores import Scores
    from rlhfjax.rewards.scoring import Pending, Rewards

_HOMES = {"Pending": "scoring", "Rewards": "scoring", "Scores": "scores"}


def __getattr__(name: str) -> Any:
    # A worker imports this package, too, and needs nothing of all this: it starts in half the time.
    import importlib

    if name in __all__:
        return getattr(importlib.import_module(f"rlhfjax.rewards.{_HOMES.get(name, 'code')}"), name)
    raise AttributeError(f"module 'rlhfjax.rewards' has no attribute {name!r}")
