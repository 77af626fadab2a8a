"""`rlhfjax goodput`: what became of the time of a run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhfjax import stores
from rlhfjax.cli.datasets import directory
from rlhfjax.errors import ConfigError


def goodput(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", parser=directory, help="The directory of a run.")],
) -> None:
    """Print where the wall time of a run went, over all its starts, and how long each restart took to recover.

    \b
    Example:
      rlhfjax goodput runs/quickstart
    """
    from rlhfjax.evaluation.report.time import restart_rows, spent_rows, steps_line
    from rlhfjax.host.goodput import FILE, account_of

    account = account_of(stores.place_of(run_dir))
    if account is None:
        raise ConfigError(f"{run_dir}: expected the directory of a run that keeps its time, got one without {FILE}")
    out = Console(highlight=False)
    out.print(_table(("time", "wall time", "share"), spent_rows(account)))
    out.print(Text(steps_line(account)))
    if restarts := restart_rows(account):
        out.print(_table(("start", "the one before", "to the first new step"), restarts))


def _table(header: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table()
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place and place == len(header) - 1 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
