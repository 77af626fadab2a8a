"""Two losses in one gradient: PPO-ptx is `Mix(ppo, 27.8, LanguageModelling(…))` (Ouyang et al. 2022, eq. 2)."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class MixedBatch(NamedTuple):
    """One batch for each of the two losses; they may have different sizes."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Mix:
    """`first` + `coef` x `second`; each is normalised by its own count, and the gradients are added before clipping."""

    first: Any
    coef: float
    second: Any
