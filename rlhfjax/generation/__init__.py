"""One sampler for rollouts, evaluation and one-off text."""

from rlhfjax.generation.engine import SamplingParams, generate

__all__ = ["SamplingParams", "generate"]
