"""JSON that every reader takes: numbers that are not finite are the words "NaN", "Infinity" and "-Infinity".

JSON has no such numbers. What Python writes for them by itself stops jq, JavaScript and databases at that line; words
in their place are what protocol buffers write in JSON (and pydantic, for `evaluation.json`). `float` reads them back.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The value with words for numbers that are not finite, at any depth; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def dumps(value: Any, **how: Any) -> str:
    """`json.dumps` of `plain(value)`, text as it is; `how` are other arguments of it."""
    settings: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False} | how
    return json.dumps(plain(value), **settings)


def number(value: Any) -> float | None:
    """The number that a field holds, words of `plain` included; None of anything else, a bool among it."""
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
