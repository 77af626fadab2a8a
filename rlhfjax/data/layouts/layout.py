"""Layouts: how the rows of somebody's file become our records, and what of them nobody reads.

A layout is told by the fields of a row and says, for each record kind it can give, in words and as a function, which
field becomes what. It knows no files: rows come as decoded objects and leave as objects for `parse_record`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhfjax.data.fields import Fields
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.record_kinds import FIELDS

Object = dict[str, Any]
Convert = Callable[[Fields], list[Object]]

# Fields whose names say that they are meant to shape the text or the loss: if nothing reads them, somebody should know.
_MEDIA = frozenset({"images", "image", "videos", "video", "audios", "audio"})
MEANINGFUL = _MEDIA | {
    *("system", "system_prompt", "tools", "functions", "history", "input", "context", "choices", "thinking"),
    *("label", "kto_tag", "weight", "score", "score_chosen", "score_rejected", "margin"),
}


class Way(NamedTuple):
    """How one record kind is given: in words, as a function of a row's fields, and which rows give no record."""

    explain: str
    convert: Convert
    omits: str = ""


def _as_they_come(objects: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield from objects


@dataclass(frozen=True)
class Layout:
    """One layout: its name, the fields that tell it, whether a row has them, and the ways it can be read."""

    name: str
    fields: str
    fits: Callable[[Object], bool]
    ways: Mapping[str, Way]
    gathered: Callable[[Iterable[tuple[str, Any]]], Iterator[tuple[str, Any]]] = _as_they_come
    """Makes one row of what a file spreads over several; as they come, for nearly all layouts."""

    @property
    def gathers(self) -> bool:
        """Whether a row is made of several."""
        return self.gathered is not _as_they_come

    @property
    def kinds(self) -> tuple[str, ...]:
        """The record kinds that it can give, the one it was made for first."""
        return tuple(self.ways)

    def explain(self, kind: str) -> str:
        """Which field becomes what, in one line. Raises ConfigError for a kind that the layout cannot give."""
        return self._way(kind).explain

    def omits(self, kind: str) -> str:
        """Which rows give no record, in words that follow "left out:"; empty where every row gives one."""
        return self._way(kind).omits

    def rows(self, kind: str, obj: Any, where: str) -> list[Object]:
        """The objects for `parse_record` that one row gives: one, several, or none.

        Fields that the layout does not read are kept beside, so that they come to lie under `extra`; one whose name
        the record needs itself is kept as `original_NAME`.

        Raises DataError, beginning with `where`, for a row that is not of this layout: the field, and the fields there
        are. ConfigError for a kind that the layout cannot give.
        """
        fields = self._fields(obj, where)
        given = self._way(kind).convert(fields)
        return [{**_beside(kind, fields.left, row), **row} for row in given]

    def unread(self, kind: str, obj: Any) -> set[str]:
        """The fields of one row that have a known meaning and that this way of reading it takes no notice of.

        Of a row that is not of this layout nothing is said here: `rows` says it.
        """
        try:
            fields = self._fields(obj, "")
            rows = self._way(kind).convert(fields)
        except DataError:
            return set()
        left = {name for name, value in fields.left.items() if name in MEANINGFUL and value not in (None, "", [], {})}
        messages = [message for row in rows for message in row.get("messages") or [] if isinstance(message, dict)]
        return left | {f"messages.{name}" for message in messages for name in _MEDIA if message.get(name)}

    def _fields(self, obj: Any, where: str) -> Fields:
        if not isinstance(obj, dict):
            raise DataError(f"{where}: expected an object with the fields {self.fields}, got a {type(obj).__name__}")
        return Fields(f"row of the layout {self.name}", obj, where)

    def _way(self, kind: str) -> Way:
        if kind not in self.ways:
            raise ConfigError(f"the layout {self.name} gives {' or '.join(self.kinds)} records, not {kind}")
        return self.ways[kind]


def _beside(kind: str, left: Object, row: Object) -> Object:
    taken = FIELDS[kind] | set(row)
    return {f"original_{name}" if name in taken else name: value for name, value in left.items()}
