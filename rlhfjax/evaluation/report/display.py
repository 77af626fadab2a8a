"""Figures, times and foreign text as a reader sees them, the same in the terminal and on the page."""

import math
import unicodedata

from rlhfjax.evaluation.statistics import Interval

NOT_RUN = "not run"
NONE = "–"
_HARD = "\u00a0"  # a space that no line breaks at: a figure stays whole in a narrow column


def visible(text: str) -> str:
    """Foreign text with nothing left that acts: control, direction and unpaired surrogate characters are spelt out.

    Line breaks and tabs stay. An escape sequence would otherwise drive the terminal, and a direction override would
    show words in another order than they stand in the file.
    """
    return "".join(c if c in "\n\t" or not _acts(c) else f"\\u{{{ord(c):x}}}" for c in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def one_line(text: str, limit: int | None = None) -> str:
    """The visible text on one line, cut at `limit` characters."""
    line = " ".join(visible(text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return NONE if share is None or math.isnan(share) else f"{100 * share:.{digits}f}{_HARD}%"


def percent_interval(interval: Interval | None) -> str:
    """An interval of shares as percentages: `64.2 % [62.3, 66.1]`."""
    if interval is None or math.isnan(interval.estimate):
        return NONE
    return f"{percent(interval.estimate)}{_HARD}[{100 * interval.low:.1f},{_HARD}{100 * interval.high:.1f}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number to `digits` decimals, with a true minus sign."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def number_interval(interval: Interval, digits: int = 2) -> str:
    """A figure and the two ends of its interval: `2.02 [1.84, 2.20]`."""
    estimate, low, high = (number(value, digits) for value in interval)
    return f"{estimate}{_HARD}[{low},{_HARD}{high}]"


def change(value: float, before: float) -> str:
    """The relative change from `before`, signed: `+2.1 %`."""
    if not before or math.isnan(value) or math.isnan(before):
        return NONE
    return f"{100 * (value / before - 1):+.1f} %".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Wall time in the two largest units: `45 s`, `2 min 5 s`, `3 h 10 min`."""
    if seconds is None or math.isnan(seconds):
        return NONE
    total = round(seconds)
    if total < 60:
        text = f"{seconds:.1f} s" if seconds < 9.95 else f"{total} s"
    elif total < 3600:
        text = f"{total // 60} min {total % 60} s"
    else:
        text = f"{total // 3600} h {total % 3600 // 60} min"
    return text.replace(" ", _HARD)
