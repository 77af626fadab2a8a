"""Algorithms: frozen dataclasses over functions of (parameters, arrays). They know no model class, mesh or loop.

Each is in the module of its name. What loops ask of them is in `objective`: `Objective` for batches, `OnlineAlgorithm`
for what the policy samples.
"""

from rlhfjax.algorithms.objective import Mix, Objective, OnlineAlgorithm, online_part, restrict

__all__ = ["Mix", "Objective", "OnlineAlgorithm", "online_part", "restrict"]
