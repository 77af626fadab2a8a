"""The recipe: each stage a short function that puts models, data, algorithm and loop together."""

from rlhfjax.stages.recipe import run_recipe

__all__ = ["run_recipe"]
