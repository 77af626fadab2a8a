"""Digests of rows that a run keeps of its data, and what they say of data that are other ones now."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhfjax.config import Run, schema
from rlhfjax.config.recipe import Entry, stages_of
from rlhfjax.data.datasets import default_data_dir
from rlhfjax.data.row_digests import Rows, first_changed, place_of_row, read_rows, rows_of_source, write_rows
from rlhfjax.errors import RlhfjaxError
from rlhfjax.training.ledger import FILE, entries_of

FOLDER = "inputs"


def keep_rows(
    run_dir: Path,
    entries: list[Entry],
    data_dir: Path,
    fingerprints: Mapping[str, str],
    report: Callable[[str], None],
) -> None:
    """Write the digests of the rows of each source to RUN/inputs, if they are not there. A full disk is reported."""
    try:
        for entry, kind in entries:
            path, fingerprint = path_of(run_dir, entry.name), fingerprints[entry.name]
            if read_rows(path, fingerprint):
                continue
            rows = rows_of_source(entry.source, entry.split, data_dir, kind, entry.reading)
            if rows:
                write_rows(path, rows, fingerprint)
    except OSError as error:
        report(f"{run_dir / FOLDER} cannot be written: {error.strerror}; a row that changes will not be found there")


def changed_rows(run: Run, run_dir: Path, entries: list[Entry], then: Mapping[str, str]) -> dict[str, str]:
    """By the name of each source whose rows are others than those of `then`: which row, where, and who reads it first.

    Nothing of sources whose rows the run does not know, or that cannot be read.
    """
    data_dir = Path(run.data_dir) if run.data_dir else default_data_dir()
    found: dict[str, str] = {}
    for entry, kind in entries:
        kept = read_rows(path_of(run_dir, entry.name), then.get(entry.name, ""))
        if kept is None or entry.name in found:
            continue
        try:
            now = rows_of_source(entry.source, entry.split, data_dir, kind, entry.reading, kept.block)
        except RlhfjaxError:
            continue
        if now and (said := _said(run, run_dir, entry, kind, kept, now)):
            found[entry.name] = said
    return found


def _said(run: Run, run_dir: Path, entry: schema.Data, kind: str, then: Rows, now: Rows) -> str:
    changed = first_changed(then, now)
    if changed is None:
        return ""
    first, end, count = changed
    what = f"row {first}" if end - first <= 1 else f"one of the rows {first} to {end - 1}"
    place = place_of_row(entry.source, entry.split, kind, entry.reading, first) if end - first <= 1 else ""
    where = f" ({place})" if place else ""
    more = f", and {count - 1} more" if count > 1 and then.count == now.count else ""
    counts = f"; {then.count} rows then, {now.count} now" if then.count != now.count else ""
    if first >= now.count:
        said = f"{what} is not there any more{counts}"
    elif first >= then.count:
        said = f"{what}{where} is new{counts}"
    else:
        said = f"{what}{where} is another{more}{counts}"
    reads = "; ".join(_first_read(run, run_dir, entry.name, range(first, end)))
    return f"{said}; {reads}" if reads else said


def _first_read(run: Run, run_dir: Path, name: str, rows: range) -> list[str]:
    """The stages that read one of the rows, with the first step that did, by their ledgers."""
    found = []
    for stage in stages_of(run):
        path = run_dir / stage / FILE
        step = _step_of(path, name, rows) if path.is_file() else None
        found += [f"{stage} read it first at step {step}"] if step is not None else []
    return found


def _step_of(path: Path, name: str, rows: range) -> int | None:
    told = (entry.content or {} for entry in entries_of(path))
    before = 0
    for source in next(told, {}).get("sources", ()):
        if source["name"] == name:
            break
        before += source["count"]
    else:
        return None
    wanted = range(rows.start + before, rows.stop + before)
    return next((line["step"] for line in told if any(row in wanted for row in line.get("rows", ()))), None)


def path_of(run_dir: Path, name: str) -> Path:
    return run_dir / FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.rows"
