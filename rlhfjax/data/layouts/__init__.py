"""Layouts: the forms of data files that people have, each told by its fields and turned into our records.

Pure functions on decoded objects: reading files and printing what was recognised is the caller's.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.data.layouts import (
    annotations,
    conversations,
    instructions,
    own,
    preferences,
    questions,
    scored,
    transcripts,
    trees,
)
from rlhfjax.data.layouts.layout import Layout
from rlhfjax.data.layouts.mapping import mapped
from rlhfjax.errors import DataError
from rlhfjax.record_kinds import FIELDS, require_layout

__all__ = ["NAMES", "Layout", "mapped", "named", "recognise"]

# In the order in which they are tried: ours first, and what has more fields before what has fewer. Text alone is last.
_TABLE: tuple[Layout, ...] = (
    *own.LAYOUTS,
    *scored.LAYOUTS,
    *annotations.LAYOUTS,
    *trees.LAYOUTS,
    *transcripts.LAYOUTS,
    *instructions.LAYOUTS,
    *questions.LAYOUTS,
    *preferences.LAYOUTS,
    *conversations.LAYOUTS,
    *own.DOCUMENTS,
)
_NAMED: Mapping[str, Layout] = {**{layout.name: layout for layout in _TABLE}, own.NAME: own.ANY}
NAMES = tuple(dict.fromkeys(layout.name for layout in _TABLE))
_NEAREST = 3


def named(name: str) -> Layout:
    """The layout of that name. Raises ConfigError that names the nearest ones."""
    require_layout(name)
    return _NAMED[name]


def recognise(sample: Sequence[Any], kind: str | None) -> Layout:
    """The layout that most rows of the sample fit, among those that can give `kind` (any, where it is None).

    Where several fit as many rows the first in the table is taken. Rows of which nothing is recognised but that have a
    field of the record kind are taken for records of ours, so that an error is about the row.

    Raises DataError that names the fields of the sample and the nearest layouts.
    """
    objects = [obj for obj in sample if isinstance(obj, dict)]
    able = [layout for layout in _TABLE if kind is None or kind in layout.kinds]
    fitting = [sum(layout.fits(obj) for obj in objects) for layout in able]
    if fitting and max(fitting) > 0:
        return able[fitting.index(max(fitting))]
    names = Counter(name for obj in objects for name in obj)
    if kind and FIELDS[kind] & set(names):
        return own.ANY
    raise _unknown(objects, names, able, kind)


def _unknown(objects: Sequence[Any], names: Counter[str], able: Sequence[Layout], kind: str | None) -> DataError:
    wanted = f"rows of a layout that gives {kind} records" if kind else "rows of a known layout"
    got = f"the fields {', '.join(sorted(map(str, names)))}" if names else f"{len(objects)} objects with fields"
    near = sorted(able, key=lambda layout: -_likeness(set(names), layout))[:_NEAREST]
    nearest = "; ".join(f"{layout.name}: {layout.fields}" for layout in near)
    return DataError(f"expected {wanted}, got {got} (nearest: {nearest}); name the fields with --map OURS=THEIRS")


def _likeness(names: set[str], layout: Layout) -> float:
    words = set(layout.fields.replace(",", "").split())
    return len(words & names) / len(words)
