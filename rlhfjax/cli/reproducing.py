"""The verb that does a finished run again and compares."""

from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import stores
from rlhfjax.cli.datasets import directory
from rlhfjax.cli.launching import Coordinator, NumProcesses, ProcessId, among_processes, one_of_several
from rlhfjax.launch.process_group import Restarts, supervise
from rlhfjax.terminal import say

_GRACE = 10.0  # seconds that the others have to end when one has failed


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
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
) -> None:
    """Run a finished run again, and compare every step and the last checkpoints to the last bit.

    Refuses, with one line a difference, where code, packages, flags, devices or data are not those of the run. Exits
    with 4 then, and where the runs differ. A run of several processes runs again in as many on this machine, or in
    those that this is one of.

    \b
    Examples:
      rlhfjax reproduce runs/quickstart --only-check
      rlhfjax reproduce runs/quickstart
    """
    from rlhfjax.host.determinism import use_determinism
    from rlhfjax.runs.layouts import launched_here
    from rlhfjax.runs.reproduce import finished, reproduce, require_new

    if target:
        stores.require_local(target, "--run-dir")
    beside = Path("runs", "beside") if stores.is_url(run_dir) else run_dir
    given, run_dir = run_dir, stores.here(run_dir)
    target = target or beside.with_name(f"{run_dir.resolve().name}-reproduced")
    run, attempts = finished(run_dir)
    among = (coordinator, num_processes, process_id)
    if not one_of_several(*among):
        if not only_check:
            require_new(target)
        use_determinism(run.reliability.determinism)
        if layout := launched_here(run_dir, attempts):
            say(f"{run_dir} ran in {layout}: started here")
            words = ["reproduce", str(given), "--run-dir", str(target), *(["--only-check"] if only_check else [])]
            raise typer.Exit(supervise(words, layout.processes, layout.devices, Restarts(0, 0, None), _GRACE, say))
    with among_processes(run.reliability, *among):
        reproduce(run_dir, target, only_check)
