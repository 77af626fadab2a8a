"""The one door: every verb of `rlhfjax`. jax and what needs it are imported inside the verbs that use them."""

import importlib.metadata
import os
from typing import Annotated

import typer

from rlhfjax.cli import (
    asking,
    chatting,
    checking,
    configurations,
    datasets,
    describing,
    examining,
    generating,
    launching,
    moderating,
    planning,
    rehearsing,
    rendering,
    reproducing,
    running,
    serving,
    timing,
    transferring,
)
from rlhfjax.launch.process_group import die_with_launcher
from rlhfjax.terminal import Door
from rlhfjax.xla_flags import check_flags

app = typer.Typer(cls=Door, no_args_is_help=True, **datasets.OPTIONS)
app.add_typer(datasets.data, name="data")
launching.launch.command("render")(rendering.render)
app.add_typer(launching.launch, name="launch")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlhfjax {importlib.metadata.version('rlhfjax')}")
        raise typer.Exit


@app.callback()
def _door(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """The whole InstructGPT recipe in JAX, from raw text and human rankings to an aligned chat model.

    \b
    Example:
      rlhfjax run quickstart
    """
    check_flags(os.environ)


for verb in (
    checking.verify,
    running.run,
    planning.plan,
    configurations.ls,
    configurations.cp,
    configurations.show,
    configurations.validate,
    configurations.schema,
    generating.generate,
    chatting.chat,
    asking.score,
    moderating.moderate,
    serving.serve,
    transferring.import_,
    transferring.export,
    transferring.verify_export,
    reproducing.reproduce,
    timing.goodput,
    examining.doctor,
    rehearsing.rehearse,
    describing.env,
    describing.metrics,
):
    app.command(verb.__name__.rstrip("_").replace("_", "-"))(verb)


def main() -> None:
    """Entry point of the console script."""
    die_with_launcher()
    app()
