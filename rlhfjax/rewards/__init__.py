"""Rewards that are found on the host: rules, functions and commands, beside the device and apart from its process.

`Example` is what a reward sees, `Rewards` the rewards of a stage at work. Nothing here imports jax.
"""

from rlhfjax.rewards.code import digests_of, facts_of, refuse_other_code
from rlhfjax.rewards.example import Example
from rlhfjax.rewards.scores import Scores
from rlhfjax.rewards.scoring import Pending, Rewards

__all__ = ["Example", "Pending", "Rewards", "Scores", "digests_of", "facts_of", "refuse_other_code"]
