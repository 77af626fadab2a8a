"""Models as pure functions of parameter trees. Only this folder knows Flax, and it knows of no mesh."""

from rlhfjax.models.decoder import compute_dtype, decoder_config
from rlhfjax.models.interface import LanguageModel
from rlhfjax.models.layers import DecoderConfig

__all__ = ["DecoderConfig", "LanguageModel", "compute_dtype", "decoder_config"]
