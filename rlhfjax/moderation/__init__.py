"""Moderation of both sides of a model: back ends find scores by category, a policy says what becomes of a text.

Nothing here imports jax.
"""

from rlhfjax.moderation.moderator import Guarded, Moderator, Treatment
from rlhfjax.moderation.policy import Policy, open_policy, policy_files, read_policy
from rlhfjax.moderation.rules import Rules
from rlhfjax.moderation.streaming import Guard
from rlhfjax.moderation.verdicts import (
    ACTIONS,
    CATEGORIES,
    Backend,
    BackendError,
    Judgement,
    Look,
    Span,
    Verdict,
)

__all__ = [
    "ACTIONS",
    "CATEGORIES",
    "Backend",
    "BackendError",
    "Guard",
    "Guarded",
    "Judgement",
    "Look",
    "Moderator",
    "Policy",
    "Rules",
    "Span",
    "Treatment",
    "Verdict",
    "open_policy",
    "policy_files",
    "read_policy",
]
