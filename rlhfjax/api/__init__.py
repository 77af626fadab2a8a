"""The Python interface: a trained model to compute with, sample from and score with."""

from rlhfjax.api.loading import load
from rlhfjax.api.model import Model
from rlhfjax.api.prompts import Prompt
from rlhfjax.api.responses import Completion
from rlhfjax.api.session import Session, Stream

__all__ = ["Completion", "Model", "Prompt", "Session", "Stream", "load"]
