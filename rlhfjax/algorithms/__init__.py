"""Algorithms: frozen dataclasses over functions of (parameters, arrays). They know no model class, mesh or loop.

What loops ask of them is in `objective`: `Objective` for batches, `OnlineAlgorithm` for what the policy samples.
"""

from rlhfjax.algorithms.dpo import Dpo
from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.algorithms.language_modelling import LanguageModelling, RoutedLanguageModelling
from rlhfjax.algorithms.objective import Mix, Objective, OnlineAlgorithm, online_part, restrict
from rlhfjax.algorithms.ppo import Ppo
from rlhfjax.algorithms.reward_modelling import RewardModelling
from rlhfjax.algorithms.rloo import Rloo

__all__ = [
    "Dpo",
    "Grpo",
    "LanguageModelling",
    "Mix",
    "Objective",
    "OnlineAlgorithm",
    "Ppo",
    "RewardModelling",
    "Rloo",
    "RoutedLanguageModelling",
    "online_part",
    "restrict",
]
