"""The kinds of models, told apart by their configuration."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.encoder_decoder import EncoderDecoder
from rlhfjax.models.interface import LanguageModel
from rlhfjax.models.transformer_2017 import FAMILY, EncoderDecoderConfig

SequenceModel: TypeAlias = LanguageModel | EncoderDecoder  # both have every function that stages and sampler call


def model_of(described: Mapping[str, Any]) -> SequenceModel:
    """The model of a configuration as checkpoints hold it: the fields of its dataclass, told apart by `family`."""
    if described.get("family") == FAMILY:
        return EncoderDecoder(EncoderDecoderConfig(**described))
    return LanguageModel(DecoderConfig(**described))
