"""One sampler for rollouts, evaluation and one-off text, and a search for the best response."""

from rlhfjax.generation.beam import BeamParams, beam_search
from rlhfjax.generation.engine import generate
from rlhfjax.generation.sampling import SamplingParams

__all__ = ["BeamParams", "SamplingParams", "beam_search", "generate"]
