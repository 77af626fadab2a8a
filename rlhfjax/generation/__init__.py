"""One sampler for rollouts, evaluation and one-off text, and a search for the best response."""

from rlhfjax.generation.beam import BeamParams, beam_search
from rlhfjax.generation.engine import SamplingParams, generate

__all__ = ["BeamParams", "SamplingParams", "beam_search", "generate"]
