"""`rlhfjax launch render`: a launch file, filled from a plan or by arithmetic."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli.configurations import Config
from rlhfjax.cli.datasets import Overrides, pairs
from rlhfjax.cli.options import with_options
from rlhfjax.errors import ConfigError
from rlhfjax.launch.needs import Needs, of_plan, of_topology
from rlhfjax.launch.rendering import TARGETS, TOPOLOGIES, Order
from rlhfjax.launch.rendering import render as rendered
from rlhfjax.terminal import say


@dataclass(frozen=True)
class Where:
    """On what it runs, and where its directory is."""

    nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Nodes; of TPUs the topology says it.")] = None
    topology: Annotated[
        str | None, typer.Option(metavar="KIND:SHAPE", help="v5p:4x4x4, h100:8 (GPUs of a node) or cpu.")
    ] = None
    slices: Annotated[int, typer.Option(metavar="N", min=1, help="Slices of TPUs.")] = 1
    run_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where everything goes; gs://… or s3://… from most places.")
    ] = None
    image: Annotated[str | None, typer.Option(metavar="IMAGE", help="The container's image.")] = None
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="What `rlhfjax plan --json` wrote of this run.")
    ] = None


@with_options
def render(
    platform: Annotated[str, typer.Argument(metavar="|".join(TARGETS), help="What launches it.")],
    config: Config,
    where: Where,
    overrides: Overrides = None,
) -> None:
    """Print the file that launches a run elsewhere. It asks for what a plan says, and refuses what that refuses.

    \b
    Example:
      rlhfjax launch render slurm instructgpt_1b3 --nodes 2 --topology h100:8 > train.sbatch
    """
    if platform not in TARGETS:
        raise ConfigError(f"expected one of {', '.join(TARGETS)}, got {platform!r}")
    loaded = configuration.load_config(config, pairs(overrides))
    needs = _needs(platform, where, configuration.config_hash(loaded))
    if loaded.mesh.slices != needs.slices:
        raise ConfigError(
            f"mesh.slices: expected {needs.slices}, as many slices as it runs on, got {loaded.mesh.slices}; give "
            f"mesh.slices={needs.slices} or --slices {loaded.mesh.slices}"
        )
    configuration.check(loaded, needs.devices)
    given = Path(config)
    order = Order(
        name=loaded.name,
        config=config,
        overrides=tuple(overrides or ()),
        run_dir=where.run_dir or f"runs/{loaded.name}",
        needs=needs,
        command=shlex.join(["rlhfjax", "launch", "render", platform, config, *(overrides or ()), *_options(where)]),
        image=where.image,
        text=given.read_text(encoding="utf-8") if given.is_file() else None,
    )
    typer.echo(rendered(platform, order), nl=False)


def _needs(platform: str, where: Where, config_hash: str) -> Needs:
    """From the plan of this configuration where there is one, and nothing else then."""
    if where.plan is None:
        topology = where.topology or TOPOLOGIES[TARGETS[platform].devices[0]]
        needs = of_topology(topology, where.nodes, where.slices)
        say(
            f"not planned: {needs.devices} devices on {needs.hosts} hosts by arithmetic, {needs.grace_s} s to save and "
            "memory as a node has it by default; whether it fits is not known (--plan)"
        )
        return needs
    try:
        plan = json.loads(where.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where.plan}: expected a plan as `rlhfjax plan --json` writes it: {error}") from None
    if not isinstance(plan, dict):
        raise ConfigError(f"{where.plan}: expected a plan, an object of JSON, got {type(plan).__name__}")
    if plan.get("config_hash", config_hash) != config_hash:
        raise ConfigError(f"{where.plan}: expected a plan of this configuration with its overrides; plan it anew")
    needs = of_plan(plan)
    asked = {"--nodes": (where.nodes, needs.hosts), "--topology": (where.topology, needs.topology)}
    for option, (wanted, planned) in asked.items():
        if wanted not in (None, planned):
            raise ConfigError(f"{option}: expected {planned}, as {where.plan} has it, got {wanted}; plan it anew")
    if where.slices not in (1, needs.slices):
        raise ConfigError(f"--slices: expected {needs.slices}, as {where.plan} has it, got {where.slices}")
    return needs


def _options(where: Where) -> list[str]:
    """The options as they were given, but for those that say what is so anyhow."""
    given = {
        "--nodes": where.nodes,
        "--topology": where.topology,
        "--slices": where.slices if where.slices > 1 else None,
        "--run-dir": where.run_dir,
        "--image": where.image,
        "--plan": where.plan,
    }
    return [str(word) for option, value in given.items() if value is not None for word in (option, value)]
