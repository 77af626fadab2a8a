"""One sampler for rollouts, evaluation, one-off text and streams, and a search for the best response."""

from rlhfjax.generation.beam import BeamParams, beam_search
from rlhfjax.generation.engine import generate
from rlhfjax.generation.programs import Programs, Room
from rlhfjax.generation.sampling import RowSampling, SamplingParams, Speculation
from rlhfjax.generation.serving import Engine, Response
from rlhfjax.generation.slots import rollout

__all__ = [
    "BeamParams",
    "Engine",
    "Programs",
    "Response",
    "Room",
    "RowSampling",
    "SamplingParams",
    "Speculation",
    "beam_search",
    "generate",
    "rollout",
]
