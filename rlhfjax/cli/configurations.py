"""The verbs of configurations: what ships, a copy to edit, the resolved file, its check and its schema."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.datasets import Overrides, pairs
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import printable, say

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name (see rlhfjax ls).")]


def ls() -> None:
    """List the shipped configurations.

    \b
    Example:
      rlhfjax ls
    """
    known = configuration.shipped()
    width = max(map(len, known))
    for name, (_, description) in known.items():
        typer.echo(f"{name:<{width}}  {description}")


def cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name (see rlhfjax ls), or a file.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where the copy goes.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a configuration, comments and all, to edit it.

    \b
    Example:
      rlhfjax cp quickstart my_run.yaml
    """
    source = configuration.config_path(name)
    target = path / source.name if path.is_dir() else path
    try:
        with target.open("wb" if force else "xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise ConfigError(f"{target}: exists already; choose another path, or --force to replace it") from None
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
    say(f"wrote {target}")


def show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved configuration. It is YAML that runs, with every key.

    \b
    Example:
      rlhfjax show quickstart stages.ppo.kl.coef=0.1
    """
    typer.echo(configuration.resolved_yaml(configuration.load_config(config, pairs(overrides))), nl=False)


def validate(
    config: Config,
    overrides: Overrides = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of devices.  [default: the fewest the mesh fits]")
    ] = None,
) -> None:
    """Check a configuration and its arithmetic. Prints what it comes to and touches no device.

    \b
    Example:
      rlhfjax validate quickstart mesh.fsdp=2 --devices 8
    """
    loaded = configuration.load_config(config, pairs(overrides))
    configuration.check(loaded, devices or configuration.least_devices(loaded.mesh))
    typer.echo(f"{config} is valid\n")
    typer.echo(printable(configuration.describe(loaded, devices)))


def schema() -> None:
    """Print the JSON Schema of configurations, for editors.

    \b
    Example:
      rlhfjax schema > rlhfjax.schema.json
    """
    typer.echo(json.dumps(configuration.json_schema(), indent=2))
