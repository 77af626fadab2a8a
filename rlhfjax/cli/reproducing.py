"""The verb that does a finished run again and compares."""

from pathlib import Path
from typing import Annotated

import typer

from rlhfjax.cli.datasets import directory


def reproduce(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", parser=directory, help="The directory of a finished run.")],
    target: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", metavar="DIR", parser=directory, help="Where it is run again.  [default: RUN-reproduced]"
        ),
    ] = None,
    only_check: Annotated[
        bool, typer.Option("--only-check", help="Only see whether it can be reproduced here; run nothing.")
    ] = False,
) -> None:
    """Run a finished run again, and compare every step and the last checkpoints to the last bit.

    Refuses, with one line a difference, where code, packages, flags, devices or data are not those of the run. Exits
    with 4 then, and where the runs differ.

    \b
    Examples:
      rlhfjax reproduce runs/quickstart --only-check
      rlhfjax reproduce runs/quickstart
    """
    from rlhfjax.runs.reproduce import reproduce

    reproduce(run_dir, target or run_dir.with_name(f"{run_dir.resolve().name}-reproduced"), only_check)
