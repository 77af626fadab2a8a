"""`rlhfjax plan`: what a recipe compiles to for hardware that is not here."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.configurations import Config
from rlhfjax.cli.datasets import Overrides, pairs
from rlhfjax.config.recipe import NAMES
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import printable, say


def plan(
    config: Config,
    overrides: Overrides = None,
    topology: Annotated[
        str | None, typer.Option(metavar="KIND:SIZES", help="A slice of TPUs, v5p:8x8x8, or hosts x GPUs, h100:8x8.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="So many devices of a CPU, this one.  [default: 1]")
    ] = None,
    num_slices: Annotated[int, typer.Option("--num-slices", "--slices", min=1, help="Slices of TPUs.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where the plan is written.")] = None,
    programs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keeps the compiled programs, for `run --plan DIR`.")
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option(metavar="STAGE=N", help="Rows of a stage that is measured in epochs.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(metavar="TOKENS", min=2, help="The longest comparison, its prompt counted once.")
    ] = None,
    disk: Annotated[float, typer.Option(metavar="BYTES/S", min=1, help="What a host writes of a checkpoint.")] = 1e9,
    minutes: Annotated[float, typer.Option(metavar="M", min=0.1, help="For the compiler of one program.")] = 10.0,
    search: Annotated[bool, typer.Option(help="Look for changes where something does not fit.")] = True,
) -> None:
    """Compile every program of every stage for hardware that is not here, and say whether it fits.

    Exit code 2 where it does not, with what to change. Nothing runs on a device, and no data are read.

    \b
    Example:
      rlhfjax plan quickstart --devices 2 --json plan.json
    """
    from rlhfjax.planning.answer import asked, kept

    if topology and devices:
        raise ConfigError("--topology and --devices: give one of them")
    loaded = configuration.load_config(config, pairs(overrides))
    question = asked(
        loaded, topology, devices, num_slices, rows=counted(rows or []), longest=longest, disk=disk,
        programs=programs, seconds=60 * minutes, say=say,
    )  # fmt: skip
    found = kept(question, search, programs, say)
    from rlhfjax.planning.table import table

    typer.echo(printable(table(found)))
    if json_file:
        part = json_file.with_name(f".{json_file.name}.{os.getpid()}")
        json_file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(json_file)
    if not found["fits"]:
        raise ConfigError(f"{found['name']} does not fit {found['topology']}: {found['reasons'][0]}")


def counted(words: list[str]) -> dict[str, int]:
    """Rows by stage."""
    found = {}
    for word in words:
        stage, _, number = word.partition("=")
        if stage not in NAMES or not number.replace("_", "").isdigit():
            raise ConfigError(f"--rows: expected STAGE=N with a stage among {', '.join(NAMES)}, got {word!r}")
        found[stage] = int(number)
    return found
