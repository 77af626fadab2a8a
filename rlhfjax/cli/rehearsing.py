"""`rlhfjax rehearse`: the launch of a run, on the loopback, with faults on purpose."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.configurations import Config
from rlhfjax.cli.datasets import Overrides, directory, pairs
from rlhfjax.cli.options import with_options
from rlhfjax.files import write_json
from rlhfjax.terminal import printable, say


@dataclass(frozen=True)
class Played:
    """What is played, and where."""

    nodes: Annotated[int, typer.Option(metavar="N", min=2, help="Processes, one for each node of the launch.")] = 2
    devices_per_node: Annotated[
        int | None, typer.Option(metavar="M", min=1, help="Devices of each.  [default: the fewest that the mesh fits]")
    ] = None
    faults: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of faults, or all.  [default: the usual twenty]")
    ] = None
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="The stage that is hit.  [default: the first that trains]")
    ] = None
    seed: Annotated[int, typer.Option(metavar="S", help="Decides which process is hit, and at which step.")] = 0
    at_once: Annotated[int, typer.Option(metavar="K", min=1, help="Faults that are played side by side.")] = 2
    dir: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=directory, help="Where.  [default: runs/NAME-rehearsal]")
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where the table is written.")] = None


@with_options
def rehearse(config: Config, played: Played, overrides: Overrides = None) -> None:
    """Play a run's launch on this machine, with as many processes as it has nodes, and faults in them.

    The launch file for SLURM, its preflight and its rules for exit codes are the real ones; model, batches and steps
    are tiny, on the configuration's mesh. Exit code 0 where every fault ended as expected: resumed with the bits of a
    run without faults, or in a line that names what it was; else 1. docs/reliability.md lists the faults.

    \b
    Example:
      rlhfjax rehearse quickstart --nodes 2 --faults kill,stop
    """
    from rlhfjax.data.datasets import default_data_dir
    from rlhfjax.rehearsal.playing import Wanted, family_of, table
    from rlhfjax.rehearsal.playing import rehearse as play
    from rlhfjax.rehearsal.scenes import chosen

    scenes = chosen(played.faults)
    loaded = configuration.load_config(config, pairs(overrides))
    folder = (played.dir or Path("runs") / f"{loaded.name}-rehearsal").absolute()
    wanted = Wanted(played.nodes, played.devices_per_node, played.stage, played.seed, played.at_once)
    data_dir = Path(loaded.data_dir) if loaded.data_dir else default_data_dir()
    result = play(loaded, family_of(loaded), data_dir, folder, wanted, scenes, say)
    typer.echo(printable(table(result)))
    if played.json_file:
        write_json(played.json_file, result)
    if not result["well"]:
        raise typer.Exit(1)
