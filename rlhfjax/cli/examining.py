"""`rlhfjax doctor`: whether a host, or all of a run, are fit for it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.datasets import Overrides, directory, pairs
from rlhfjax.cli.launching import Coordinator, NumProcesses, ProcessId, one_of_several
from rlhfjax.terminal import printable, say

_WAIT = 60.0


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file or a shipped name; without one, the host alone."),
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=directory, help="The directory that the run will have.")
    ] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=1, help="How long others are waited for.  [default: deadlines.join, or 60]"
        ),
    ] = None,
) -> None:
    """Check devices, disks, limits, versions, data and the other processes before a run. Changes nothing.

    A line for each check: ok, warn or FAIL. The exit code is 0, or 2 for a host or configuration, 3 for data, 4 for a
    checkpoint that is wrong; 42 where a process did not come. Takes the flags and variables of `run`.

    \b
    Example:
      rlhfjax doctor quickstart --run-dir runs/quickstart
    """
    loaded = configuration.load_config(config, pairs(overrides)) if config else None
    seconds = wait or (loaded.reliability.deadlines.join if loaded else _WAIT)
    place = None
    if one_of_several(coordinator, num_processes, process_id):
        from rlhfjax.host import cpus, examination, processes

        place = processes.place_of(coordinator, num_processes, process_id, os.environ)
        if place is None and processes.in_cluster(os.environ):
            place = examination.in_cluster()
        cpus.split_devices()
    from rlhfjax.runs.doctor import examine

    code = examine(loaded, run_dir, place, seconds, lambda text: typer.echo(printable(text)))
    if code:
        say("not fit for a run: see the lines with FAIL")
    raise typer.Exit(code)
