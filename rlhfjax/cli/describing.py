"""What this installation is and what it measures: `rlhfjax env` and `rlhfjax metrics`."""

from dataclasses import astuple, fields

import typer

from rlhfjax.terminal import printable


def env() -> None:
    """Print what to paste into a bug report. That is versions, platform, devices and flags.

    \b
    Example:
      rlhfjax env
    """
    from rlhfjax.host.environment import environment_report

    typer.echo(printable(environment_report()))


def metrics() -> None:
    """List every metric and its unit. Also what it is taken over, and how it becomes one number.

    \b
    Example:
      rlhfjax metrics
    """
    from rlhfjax.training.metrics_catalogue import METRICS, Metric

    rows = [tuple(field.name for field in fields(Metric)), *(astuple(metric) for metric in METRICS.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
