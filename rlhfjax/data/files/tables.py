"""Tables: CSV and TSV with a header, and Parquet. A row is an object with the columns as fields; an empty one has none.

What a table cannot tell apart from an absent field (an empty cell, a null) is an absent field.
"""

import csv
import datetime
import decimal
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhfjax.data.files import opening
from rlhfjax.data.files.json_values import StrictDecoder, byte_lines, text_of
from rlhfjax.errors import DataError

# Columns that hold more than text in every layout that has them: a cell in which JSON stands is read as that.
STRUCTURED = frozenset({"messages", "conversations", "responses", "ranks", "tools", "flags", "likert", "label"})
_BATCH_BYTES = 4 << 20
_MOST_ROWS = 1024


def read_csv(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows below the header: (file:line where it begins, object), or the DataError of a row that does not fit."""
    lines = (text_of(line, where) for where, line in byte_lines(file, path))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    decoder, header, at = StrictDecoder(), None, 1
    while (cells := _next_row(rows, path, at)) is not None:
        where, at = f"{path}:{at}", rows.line_num + 1
        if not cells:
            continue
        if header is None:
            header = _checked_header(cells, where)
        elif len(cells) != len(header):
            yield (
                where,
                DataError(f"{where}: expected {len(header)} cells as in the header, got {len(cells)}; quote them"),
            )
        else:
            yield where, {name: _cell(decoder, name, cell) for name, cell in zip(header, cells, strict=True) if cell}


def _next_row(rows: Any, path: Path, at: int) -> list[str] | None:
    before = csv.field_size_limit(opening.MAX_ROW_BYTES)  # of the process, so it is given back
    try:
        return next(rows, None)
    except csv.Error as error:
        got = "one without end, or longer" if "field limit" in str(error) else str(error)
        most = opening.MAX_ROW_BYTES >> 20
        raise DataError(
            f"{path}:{at}: expected CSV with fields of at most {most} MiB and quotes that close, got {got}; "
            'write a quote inside a quoted field as ""'
        ) from None
    finally:
        csv.field_size_limit(before)


def _checked_header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if not all(header) or len(set(header)) < len(header):
        raise DataError(f"{where}: expected a header with a name of its own for each column, got {header}"[:300])
    return header


def _cell(decoder: StrictDecoder, name: str, cell: str) -> Any:
    if name not in STRUCTURED:
        return cell
    text = cell.strip()
    text = text.lower() if text.lower() in ("true", "false") else text
    try:
        value, end = decoder.decode(text)
    except (ValueError, RecursionError):
        return cell
    return cell if decoder.problem or end < len(text) else value


def delimiter_of(header: str) -> str:
    """The comma, or the semicolon or tab where a header has more of these (spreadsheets in many countries)."""
    return max(",;\t", key=header.count)


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file: (file:row N, object), some at a time. Raises DataError where it is broken."""
    arrow = opening.pyarrow(path, "Parquet")
    number = 0
    try:
        with arrow.parquet.ParquetFile(path) as table:
            size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
            rows = _BATCH_BYTES * max(table.metadata.num_rows, 1) // max(size, 1)
            for batch in table.iter_batches(min(max(rows, 1), _MOST_ROWS), use_threads=False):
                if batch.nbytes > opening.MAX_ROW_BYTES * max(len(batch), 1):
                    most = opening.MAX_ROW_BYTES >> 20
                    raise DataError(f"{path}:row {number + 1}: expected rows of at most {most} MiB, got longer ones")
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}:row {number}"
                    try:
                        yield where, _plain(row, where, "")
                    except DataError as error:
                        yield where, error
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected a whole Parquet file, got {str(error).splitlines()[0][:200]}; copy or write it again"
        ) from None


def _plain(value: Any, where: str, name: str) -> Any:
    """A cell as JSON has it: nulls inside objects left out, times as ISO text."""
    if isinstance(value, dict):
        items = ((key, _plain(item, where, f"{name}.{key}" if name else key)) for key, item in value.items())
        return {key: item for key, item in items if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None  # how data frames write a missing number
        raise DataError(f"{where}: {name}: expected a finite number, got {value}; write it as a string")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{where}: {name}: expected text, got binary data; leave that column out") from None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    return value
