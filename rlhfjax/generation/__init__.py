"""One sampler for rollouts, evaluation and one-off text, and a search for the best response."""

from rlhfjax.generation.beam import BeamParams, beam_search
from rlhfjax.generation.engine import generate
from rlhfjax.generation.programs import Programs
from rlhfjax.generation.sampling import SamplingParams, Speculation
from rlhfjax.generation.slots import rollout

__all__ = ["BeamParams", "Programs", "SamplingParams", "Speculation", "beam_search", "generate", "rollout"]
