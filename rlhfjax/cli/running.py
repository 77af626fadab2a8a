"""`rlhfjax run`: the stages of a configuration, in one process or as one of several."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.checking import NoVerify
from rlhfjax.cli.configurations import Config
from rlhfjax.cli.datasets import Overrides, directory, known_stage, pairs
from rlhfjax.cli.launching import Coordinator, NumProcesses, ProcessId, among_processes, one_of_several
from rlhfjax.errors import ConfigError
from rlhfjax.integrity import unverified


def run(
    config: Config,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=directory, help="Where everything goes.  [default: runs/NAME]"),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run this stage alone.")] = None,
    start_from: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Run from this stage on.")] = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    no_verify: NoVerify = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Programs and expectations of `rlhfjax plan --programs DIR`.")
    ] = None,
) -> None:
    """Run the stages of a configuration in order. The same command again continues a run that was killed.

    \b
    Example:
      rlhfjax run quickstart stages.ppo.steps=20 --run-dir runs/short
    """
    loaded = configuration.load_config(config, pairs(overrides))
    if only and start_from:
        raise ConfigError("--only and --from: give one of them")
    for option, stage in (("--only", only), ("--from", start_from)):
        known_stage(option, stage, loaded)
    sources = configuration.key_sources(config, pairs(overrides))
    from rlhfjax import runs
    from rlhfjax.host.memory import collect_seldom, keep_freed_memory_of

    held_to: dict[str, Any] = {}
    if plan is not None:
        from rlhfjax.planning.shipped import contract_of

        held_to["plan"] = contract_of(plan, loaded)
    among = (coordinator, num_processes, process_id)
    collect_seldom()
    keep_freed_memory_of(loaded, alone=not one_of_several(*among))
    with among_processes(loaded.reliability, *among), unverified(no_verify):
        runs.run_recipe(loaded, run_dir or Path("runs") / loaded.name, only, start_from, sources, **held_to)
