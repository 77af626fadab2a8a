"""Files to canonical records: the layout is recognised from the fields, and every wrong row is counted."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhfjax.data import layouts
from rlhfjax.data.files import FileFormat, format_of, rows_between, rows_of
from rlhfjax.data.records import Record, check_kind, parse_record
from rlhfjax.errors import DataError
from rlhfjax.record_kinds import Reading

OWN = "rlhfjax"
_SAMPLE = 100
_COUNTED = 100_000  # rows that are looked at after a wrong one


RECOGNISE = Reading()


@dataclass
class Tally:
    """What was met in a file: rows, records made of them, rows that gave none, and fields that nobody reads."""

    rows: int = 0
    records: int = 0
    barren: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Tally") -> "Tally":
        rows, records = self.rows + other.rows, self.records + other.records
        return Tally(rows, records, self.barren + other.barren, self.unread + other.unread)

    def words(self, kind: str, omits: str) -> Iterator[str]:
        """A line for what is not used, if anything is not; `omits` says which rows give no record."""
        if self.barren:
            yield f"{self.barren:,} of {self.rows:,} rows gave no {kind}" + (f", left out: {omits}" if omits else "")
        if self.unread:
            fields = ", ".join(f"{name} ({count:,})" for name, count in self.unread.most_common())
            who = "no model reads, though a reward may" if kind == "prompt" else "no stage reads"
            yield f"fields that {who}, with their rows of {self.rows:,}: {fields}"


@dataclass(frozen=True)
class DataFile:
    """One file of records of one kind, with the layout that its rows are read by."""

    path: Path
    kind: str
    found: FileFormat
    layout: layouts.Layout
    reading: Reading

    def identity(self) -> str:
        """What decides, with the bytes of the file, which records it gives; "" for our own records."""
        parts = [self.layout.name] if self.layout.name != OWN else []
        parts += [f"{ours}={theirs}" for ours, theirs in self.reading.map]
        parts += [self.reading.sample_by] if self.found.rows == "text" else []
        return " ".join(parts)

    def words(self) -> str:
        """What the file is taken for, in one line."""
        return f"{self.found}, layout {self.layout.name}: {self.layout.explain(self.kind)}"

    @property
    def by_lines(self) -> bool:
        """Whether its records can be read from any line on: plain JSON lines, of which none belongs to another."""
        return (self.found.rows, self.found.compression) == ("lines", "") and not self.layout.gathers

    def records(self, tally: Tally) -> Iterator[Record]:
        """The canonical records, one at a time; `tally` counts along.

        Raises DataError for the first row that fits no record, with the number of all that do not; and for a file
        without any record.
        """
        for _, record in self._placed(rows_of(self.path, self.found, self.reading.sample_by), tally):
            yield record
        if not tally.rows:
            raise DataError(f"{self.path}: expected at least one {self.kind}, got an empty file")
        if not tally.records:
            raise DataError(
                f"{self.path} ({self.words()}): expected at least one {self.kind}, got none in {tally.rows:,} rows; "
                "choose another kind or layout"
            )

    def records_between(self, start: int, end: int, tally: Tally, before: int = 0) -> Iterator[tuple[str, Record]]:
        """The records, with their places, of the lines that begin in the bytes start … end, if there are any.

        `before` is how many lines there are before these. Raises DataError for the first row that fits no record.
        """
        yield from self._placed(rows_between(self.path, start, end, before), tally)

    def _placed(self, rows: Iterator[tuple[str, Any]], tally: Tally) -> Iterator[tuple[str, Record]]:
        rows = iter(self.layout.gathered(rows))
        for where, obj in rows:
            tally.rows += 1
            try:
                made = self._made(where, obj)
                unread = self.layout.unread(self.kind, obj)
            except DataError as error:
                raise self._counted(error, rows, tally.rows) from None
            tally.unread.update(unread)
            tally.records += len(made)
            tally.barren += not made
            for record in made:
                yield where, record

    def places(self) -> Iterator[str]:
        """The place of the row that each record is made of, in the order of `records`. Raises DataError."""
        for where, obj in self.layout.gathered(rows_of(self.path, self.found, self.reading.sample_by)):
            yield from (where for _ in self._made(where, obj))

    def _made(self, where: str, obj: Any) -> list[Record]:
        if isinstance(obj, DataError):
            raise obj
        if not isinstance(obj, dict):
            parse_record(self.kind, obj, where)  # which says what was expected
        return [parse_record(self.kind, row, where) for row in self.layout.rows(self.kind, obj, where)]

    def _counted(self, first: DataError, rest: Iterator[tuple[str, Any]], seen: int) -> DataError:
        """The first error, and on a second line how many more rows are wrong."""
        wrong, total, whole = 0, seen, True
        try:
            for where, obj in rest:
                if total - seen == _COUNTED:
                    whole = False
                    break
                total += 1
                try:
                    self._made(where, obj)
                except DataError:
                    wrong += 1
        except DataError:  # what comes after that place can't be read
            whole = False
        if total == 1:
            return first
        of = f"of {total:,}" if whole else f"of the first {total:,}"
        more = f"{wrong:,} more wrong row{'s' if wrong > 1 else ''} {of}" if wrong else f"no other wrong row {of}"
        return DataError(f"{first}\n… and {more}")


def data_file(path: str | Path, kind: str | None, reading: Reading = RECOGNISE) -> DataFile:
    """A file with its layout: the one asked for, else the one that its first hundred rows have.

    Without a `kind` it is the first that the layout can give. Raises DataError where no layout fits, naming file,
    format and fields; ConfigError for an unknown kind.
    """
    if kind is not None:
        check_kind(kind)
    path = Path(path)
    found = format_of(path)
    layout = _chosen(reading) or _recognised(path, found, kind, reading)
    if kind is None:
        kind = layout.kinds[0]
    elif kind not in layout.kinds:
        raise DataError(
            f"{path}: expected a layout that gives a {kind}, got {layout.name}, which gives {', '.join(layout.kinds)}; "
            "choose another kind or layout"
        )
    return DataFile(path, kind, found, layout, reading)


def _chosen(reading: Reading) -> layouts.Layout | None:
    """The layout that is asked for, if one is."""
    if reading.map:
        return layouts.mapped(dict(reading.map))
    return layouts.named(reading.layout) if reading.layout else None


def _recognised(path: Path, found: FileFormat, kind: str | None, reading: Reading) -> layouts.Layout:
    sample: list[Any] = []
    try:
        for _, obj in islice(rows_of(path, found, reading.sample_by), _SAMPLE):
            sample += [obj] if isinstance(obj, dict) else []
    except DataError:
        if not sample:
            raise
    if not sample:
        return layouts.named(OWN)  # which says of the first row what is wrong with it
    try:
        return layouts.recognise(sample, kind)
    except DataError as error:
        raise DataError(f"{path} ({found}): {error}") from None


def read_records(path: str | Path, kind: str, reading: Reading = RECOGNISE) -> Iterator[Record]:
    """The canonical records of one file, in the memory of a row where its format allows that. Raises as `DataFile`."""
    yield from data_file(path, kind, reading).records(Tally())
