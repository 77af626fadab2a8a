"""`rlhfjax launch`: several processes of one run on this machine, and how a run becomes one of several."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax import config as configuration
from rlhfjax import stores
from rlhfjax.cli.datasets import OPTIONS
from rlhfjax.errors import RlhfjaxError
from rlhfjax.launch.process_group import Restarts, supervise
from rlhfjax.terminal import fail, say

launch = typer.Typer(no_args_is_help=True, help="Start a run in several processes.", **OPTIONS)

Coordinator = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 of several waits for the others.")
]
NumProcesses = Annotated[int | None, typer.Option(metavar="N", min=1, help="How many processes there are.")]
ProcessId = Annotated[int | None, typer.Option(metavar="I", min=0, help="Which of them this is, from 0.")]

_SEVERAL = (  # of all that may say so; without any, jax is not asked
    *("RLHFJAX_COORDINATOR", "RLHFJAX_NUM_PROCESSES", "RLHFJAX_PROCESS_ID", "RLHFJAX_DEVICES_PER_PROCESS"),
    *("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"),
    *("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS"),
)
_OPTIONS_OF_RUN = ("--run-dir", "--only", "--from", "--coordinator", "--num-processes", "--process-id")


@launch.callback()
def _several() -> None:
    """Start a run in several processes."""


@launch.command(context_settings={"allow_interspersed_args": False})
def local(
    arguments: Annotated[list[str], typer.Argument(metavar="-- ARGS…", help="What follows `rlhfjax`.")],
    processes: Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many processes.")],
    devices_per_process: Annotated[
        int | None, typer.Option(metavar="M", min=1, help="Devices of each; CPUs are split into so many.")
    ] = None,
    restarts_preempted: Annotated[
        int, typer.Option(metavar="A", min=0, help="Starts again after a stop with everything saved (42).")
    ] = 100,
    restarts_failed: Annotated[
        int, typer.Option(metavar="B", min=0, help="Starts again after a death (128 and above).")
    ] = 3,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="What the others have to end when one has failed.")
    ] = 10.0,
) -> None:
    """Run a command in N processes of this machine that find each other over its loopback.

    When one fails the others are ended, and all are started again as far as that helps. The exit code is that of the
    first that failed. Ctrl-C and SIGTERM reach every process once; a second one kills them.

    \b
    Example:
      rlhfjax launch local -n 2 -- run quickstart --run-dir runs/two
    """
    restarts = Restarts(restarts_preempted, restarts_failed, run_dir_of(arguments))
    raise typer.Exit(supervise(arguments, processes, devices_per_process, restarts, grace, say))


def run_dir_of(arguments: list[str]) -> Path | None:
    """The run directory that the arguments of `rlhfjax run` mean; None of another verb, and where they are wrong."""
    if not arguments or arguments[0] != "run":
        return None
    given: dict[str, str] = {}
    rest, words = [], iter(arguments[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if name in _OPTIONS_OF_RUN:
            given[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if "--run-dir" in given:
        return stores.place_of(Path(given["--run-dir"]))
    try:
        return Path("runs") / configuration.load_config(rest[0], rest[1:]).name
    except (RlhfjaxError, IndexError):
        return None  # the processes will say it


def one_of_several(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether flags or variables speak of several processes; a cluster's may mean one after all."""
    flags = (coordinator, num_processes, process_id)
    return any(flag is not None for flag in flags) or any(name in os.environ for name in _SEVERAL)


@contextmanager
def among_processes(
    settings: Any, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """What is inside runs as one of several processes where flags, variables or a cluster say so.

    `settings` is the `reliability` section. Raises ConfigError or Stopped when the processes do not come together.
    """
    flags = (coordinator, num_processes, process_id)
    if not one_of_several(*flags):
        yield
        return
    from rlhfjax.host.processes import place_of, started

    place = place_of(*flags, os.environ)
    with started(place, heartbeat=settings.heartbeat, timeout=settings.deadlines.join, say=say, failed=_said):
        yield


def _said(error: BaseException) -> int:
    """Says what a process failed with, and gives its exit code."""
    if isinstance(error, RlhfjaxError):
        return fail(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    traceback.print_exception(error)
    return 1
