"""What a plan takes for granted, where neither the configuration nor the makers of a machine say it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Assumed:
    """`rows` by stage, of those that are measured in epochs; tokens of the `longest` comparison (None: of the section).

    `disk` is what a host writes of a checkpoint, bytes/s; the compiler of one program gets so many `seconds`.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    longest: int | None = None
    disk: float = 1e9
    seconds: float = 600.0
