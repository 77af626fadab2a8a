"""The report of a run: one self-contained page of figures, tables and samples, written beside the run's files.

Everything on the page is escaped text or a figure drawn here. It loads nothing, runs no script (its own policy forbids
any), and follows the reader's light or dark setting.
"""

import os
import secrets
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlhfjax.evaluation.report.display import NOT_RUN, number, visible
from rlhfjax.evaluation.report.run_data import ReportData
from rlhfjax.evaluation.report.sections import sections


def write_report(path: str | Path, run: ReportData) -> Path:
    """Writes the run's report as one HTML file and returns its path.

    Parts that did not run say so. The file holds prompts and responses, so only its owner may read it (mode 0600); it
    appears whole or not at all.
    """
    target = Path(path)
    page = render_report(run).encode("utf-8")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(page)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render_report(run: ReportData) -> str:
    """The page as text; every string that is not a figure drawn here is escaped, whatever wrote it."""
    environment = Environment(
        loader=PackageLoader("rlhfjax.evaluation.report", "templates"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        sections=sections(run),
        provenance=flatten(run.attempts[-1]) if run.attempts else [],
        number=number,
        not_run=NOT_RUN,
    )


def flatten(record: dict[str, Any], skip: tuple[str, ...] = ("config",), prefix: str = "") -> list[tuple[str, str]]:
    """A nested record as dotted names and text; lists of plain values on one line, `skip` left out at the top."""
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in skip:
            rows += flatten(value, skip, f"{name}.")
        elif isinstance(value, list):
            rows.append((name, " ".join(str(item) for item in value)))
        elif not isinstance(value, dict):
            rows.append((name, str(value)))
    return rows
