"""`rlhfjax plan`: what a recipe compiles to for hardware that is not here."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.configurations import Config
from rlhfjax.cli.datasets import Overrides, pairs
from rlhfjax.config.recipe import NAMES
from rlhfjax.errors import ConfigError
from rlhfjax.files import write_json
from rlhfjax.planning.assumed import Assumed
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
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=N", help="rows.STAGE, longest, disk or minutes; may be given again.", parser=str),
    ] = None,
    search: Annotated[bool, typer.Option(help="Look for changes where something does not fit.")] = True,
) -> None:
    """Compile every program of every stage for hardware that is not here, and say whether it fits.

    Exit code 2 where it does not, with what to change. Nothing runs on a device, and no data are read. What these would
    say is assumed: `rows.STAGE` of a stage that is measured in epochs, and tokens of the `longest` comparison, its
    prompt counted once. `disk` is what a host writes of a checkpoint, bytes/s (1e9), `minutes` what the compiler of one
    program gets (10).

    \b
    Example:
      rlhfjax plan quickstart --devices 2 --json plan.json
    """
    from rlhfjax.planning.answer import asked, kept

    if topology and devices:
        raise ConfigError("--topology and --devices: give one of them")
    for option, folder in (("--json", json_file and json_file.parent), ("--programs", programs)):
        require_writable(option, folder)
    loaded = configuration.load_config(config, pairs(overrides))
    question = asked(
        loaded, topology, devices, num_slices, programs=programs, assumed=assumptions(assume or []), say=say
    )
    found = kept(question, search, programs, say)
    from rlhfjax.planning.table import table

    typer.echo(printable(table(found)))
    if json_file:
        write_json(json_file, found)
    if not found["fits"]:
        raise ConfigError(f"{found['name']} does not fit {found['topology']}: {found['reasons'][0]}")


def require_writable(option: str, folder: Path | None) -> None:
    """Make a folder, or raise ConfigError now and not after a plan."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {folder}: expected a directory, got: {error.strerror}; give another") from None
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {folder}: expected a directory that can be written to; give another")


def assumptions(words: list[str]) -> Assumed:
    """What `--assume` says. Raises ConfigError for a key or a number that makes no sense."""
    found: dict[str, float] = {}
    known = [*(f"rows.{name}" for name in NAMES), "longest", "disk", "minutes"]
    for word in words:
        key, _, number = word.partition("=")
        try:
            found[key] = float(number)
        except ValueError:
            found[key] = 0.0
        if key not in known or not found[key] > 0 or found[key] == float("inf"):
            raise ConfigError(f"--assume: expected KEY=N with N above 0 and KEY among {', '.join(known)}; got {word!r}")
    rows = {key.removeprefix("rows."): int(value) for key, value in found.items() if key.startswith("rows.")}
    longest = int(found["longest"]) if "longest" in found else None
    return Assumed(rows, longest, found.get("disk", 1e9), 60 * found.get("minutes", 10.0))
