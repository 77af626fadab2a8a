"""The one door: every verb of `rlhfjax`. jax and what needs it are imported inside the verbs that use them."""

import importlib.metadata
import json
import os
from dataclasses import astuple, fields
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import config as configuration
from rlhfjax.cli import asking
from rlhfjax.cli.asking import Date, Messages, PromptText, Template
from rlhfjax.cli.checking import NoVerify, verify
from rlhfjax.cli.datasets import OPTIONS, Overrides, data, directory, known_stage, pairs
from rlhfjax.cli.launching import (
    Coordinator,
    NumProcesses,
    ProcessId,
    among_processes,
    die_with_launcher,
    launch,
    one_of_several,
)
from rlhfjax.cli.reproducing import reproduce
from rlhfjax.errors import ConfigError
from rlhfjax.integrity import unverified
from rlhfjax.terminal import Door, printable, say
from rlhfjax.xla_flags import check_flags

app = typer.Typer(cls=Door, no_args_is_help=True, **OPTIONS)
app.add_typer(data, name="data")
app.add_typer(launch, name="launch")
app.command()(verify)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name (see rlhfjax ls).")]


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


@app.command()
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

    among = (coordinator, num_processes, process_id)
    collect_seldom()
    keep_freed_memory_of(loaded, alone=not one_of_several(*among))
    with among_processes(loaded.reliability, *among), unverified(no_verify):
        runs.run_recipe(loaded, run_dir or Path("runs") / loaded.name, only, start_from, sources)


@app.command()
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


@app.command()
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


@app.command()
def show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved configuration. It is YAML that runs, with every key.

    \b
    Example:
      rlhfjax show quickstart stages.ppo.kl.coef=0.1
    """
    typer.echo(configuration.resolved_yaml(configuration.load_config(config, pairs(overrides))), nl=False)


@app.command()
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


@app.command()
def schema() -> None:
    """Print the JSON Schema of configurations, for editors.

    \b
    Example:
      rlhfjax schema > rlhfjax.schema.json
    """
    typer.echo(json.dumps(configuration.json_schema(), indent=2))


@app.command()
def generate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, a stage's directory, or a run's (its last policy).")
    ],
    prompt: PromptText = None,
    message: Messages = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Answer every prompt of a file or dataset; writes JSON lines.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest response, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", min=0, help="Only the K likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="P", min=0, max=1, help="Only the likeliest with sum P.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", min=0, max=1, help="Only those P times as likely as the likeliest; 0: all.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends a response before it; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Equal seeds draw equal responses.")] = 0,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Responses to draw.")] = 1,
    speculate: Annotated[
        int, typer.Option(metavar="K", min=0, help="K draft tokens per call: the same answers, from fewer calls.")
    ] = 0,
    beams: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Search for the best response, N open at a time.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(metavar="A", min=0, help="Of the search; above 0 favours length.  [default: 0.6]")
    ] = None,
    template: Template = None,
    date: Date = None,
    no_verify: NoVerify = False,
) -> None:
    """Print what a model answers to a text or to messages, or a file's prompts with the answers to each.

    \b
    Examples:
      rlhfjax generate runs/quickstart --prompt "Review: the film is" --max-new-tokens 24 --n 3
      rlhfjax generate runs/smollm2_chat --message system="Be brief." --message "Why is the sea salty?"
      rlhfjax generate runs/quickstart --prompts prompts.jsonl > answers.jsonl
    """
    drawn = (temperature, top_k, top_p, min_p, stop or None, seed, n, speculate)
    _one_way_to_generate(beams, length_penalty, drawn != (1.0, 0, 1.0, 0.0, None, 0, 1, 0))
    if prompts and (prompt is not None or message):
        raise ConfigError("--prompts: expected it without --prompt and --message")
    given = None if prompts else asking.prompt_of(prompt, message, "--prompts")
    model = asking.load(checkpoint, date, template, no_verify)
    held = asking.records_of(prompts, "prompt") if prompts else []
    asked = held if prompts else [given]
    if beams:
        with asking.named(prompts):
            found = model.beam_search(asked, beams, max_new_tokens, 0.6 if length_penalty is None else length_penalty)
        asking.write_answers(held, [[completion] for completion in found])
        if not prompts:
            typer.echo(printable(found[0].text))
        return
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings |= {"min_p": min_p} if min_p else {}
    settings |= {"stop": stop} if stop else {}
    settings |= {"speculate": speculate} if speculate else {}
    with asking.named(prompts):
        answers = model.generate(asked, **settings, seed=seed, n=n)
    asking.write_answers(held, answers)
    completions = [] if prompts else answers[0]
    for number, completion in enumerate(completions, 1):
        mark = f"[{number}] " if n > 1 else ""
        typer.echo(f"{mark}{printable(completion.text)}")
    if speculate and (calls := sum(completion.calls or 0 for completion in completions)):
        tokens = sum(len(completion.tokens) - 1 for completion in completions)
        say(f"{tokens} tokens after the first, {tokens / calls:.2f} a call of the model")


def _one_way_to_generate(beams: int | None, length_penalty: float | None, sampled: bool) -> None:
    if beams and sampled:
        raise ConfigError(
            "--beams: a search draws nothing; remove --temperature, --top-k, --top-p, --min-p, --stop, --seed, "
            "--n and --speculate"
        )
    if length_penalty is not None and not beams:
        raise ConfigError("--length-penalty: expected --beams with it")


app.command()(asking.score)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face directory, a .gguf file, or smollm2.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", parser=directory, help="The checkpoint directory that is made.")
    ],
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="How it is stored: float32 or bfloat16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that was imported before.")] = False,
) -> None:
    """Make a checkpoint of a published model. Weights come from safetensors or GGUF; no code of a model is ever run.

    \b
    Example:
      rlhfjax import smollm2 models/smollm2
    """
    from rlhfjax import transfer

    transfer.import_model(source, target, dtype=dtype, force=force, report=say)


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, a stage's directory, or a run's (its last policy).")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", parser=directory, help="The Hugging Face directory that is made.")
    ],
    item: Annotated[
        str | None, typer.Option(metavar="ITEM", help="policy, average, value or reward.  [default: what it serves]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The largest file of weights.")] = "5GB",
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Write a policy's adapters alone, as PEFT does, in float32.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Write a model as a Hugging Face directory, with a model card and proof that it computes the same.

    Adapters are merged into their base, or with --adapters written alone.

    \b
    Example:
      rlhfjax export runs/quickstart exported/policy --dtype bfloat16
    """
    if adapters:
        if (dtype, shard_size) != ("float32", "5GB"):
            raise ConfigError("--adapters: they are one file in float32; remove --dtype and --shard-size")
        with unverified(no_verify):
            _export_adapters(checkpoint, target, item, force)
        return
    from rlhfjax import transfer

    settings = {"item": item, "dtype": dtype, "shard_size": transfer.parse_size(shard_size), "force": force}
    with unverified(no_verify):
        parity = transfer.export_checkpoint(checkpoint, target, **settings)
    [difference] = (value for key, value in parity.items() if key.endswith("_difference"))
    say(f"wrote {target} (read back, it differs by at most {difference:.2g})")


def _export_adapters(checkpoint: str, target: Path, item: str | None, force: bool) -> None:
    from rlhfjax.interop.peft import export_adapters
    from rlhfjax.training.checkpoint import find_checkpoint, load_model

    export_adapters(target, *load_model(find_checkpoint(checkpoint), item=item), force=force)
    say(f"wrote {target} (adapters alone; their base is a model of its own)")


app.command()(reproduce)


@app.command()
def env() -> None:
    """Print what to paste into a bug report. That is versions, platform, devices and flags.

    \b
    Example:
      rlhfjax env
    """
    from rlhfjax.host.environment import environment_report

    typer.echo(printable(environment_report()))


@app.command()
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


def main() -> None:
    """Entry point of the console script."""
    die_with_launcher()
    app()
