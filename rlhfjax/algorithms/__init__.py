"""Algorithms: frozen dataclasses over functions of (parameters, arrays). They know no model class, mesh or loop.

An offline algorithm has `weight(batch)`, the global count that normalises its loss, and
`loss(params, batch, weight, key) -> (loss, metrics)`, which adds up over the parts of a batch when `weight` is that of
the whole. An online one adds `estimate(rollout, kl_coef) -> (Experience, metrics)`.
"""

from rlhfjax.algorithms.dpo import Dpo
from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.algorithms.language_modelling import LanguageModelling, RoutedLanguageModelling
from rlhfjax.algorithms.mix import Mix
from rlhfjax.algorithms.ppo import Ppo
from rlhfjax.algorithms.restriction import restrict
from rlhfjax.algorithms.reward_modelling import RewardModelling
from rlhfjax.algorithms.rloo import Rloo

__all__ = [
    "Dpo",
    "Grpo",
    "LanguageModelling",
    "Mix",
    "Ppo",
    "RewardModelling",
    "Rloo",
    "RoutedLanguageModelling",
    "restrict",
]
