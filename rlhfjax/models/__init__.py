"""Models as pure functions of parameter trees. Only this folder knows Flax, and it knows of no mesh."""

from rlhfjax.models.catalogue import SequenceModel, model_of
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.decoder import compute_dtype, decoder_config
from rlhfjax.models.encoder_decoder import EncoderDecoder
from rlhfjax.models.interface import LanguageModel
from rlhfjax.models.transformer_2017 import EncoderDecoderConfig

__all__ = [
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LanguageModel",
    "SequenceModel",
    "compute_dtype",
    "decoder_config",
    "model_of",
]
