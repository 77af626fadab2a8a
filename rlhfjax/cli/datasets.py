"""The verbs of data sets, and what they share with the others."""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax import config as configuration
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import printable, say

OPTIONS = {"pretty_exceptions_enable": False, "rich_markup_mode": None, "add_completion": False}
data = typer.Typer(no_args_is_help=True, help="Prepare data sets and look at them.", **OPTIONS)


def directory(text: str) -> Path:
    """A path that was given; nothing, as a variable that is not set gives, is not the current directory."""
    if not text:
        raise typer.BadParameter("expected a directory, got nothing; give its path (the one of this terminal is .)")
    return Path(text)


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as stages.ppo.steps=200.")
]
DataDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where prepared data sets are.")]
_KINDS = "document, demonstration, comparison, prompt or rating"


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="movies, chitchat, reversal, or a name of your own.")],
    split: Annotated[
        list[str] | None, typer.Option(metavar="SPLIT=FILE.jsonl", help="One split and its file; may be repeated.")
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=f"What the files hold: {_KINDS}.")] = None,
    dialogue_filters: Annotated[
        bool, typer.Option("--dialogue-filters", help="Drop exchanges that teach nothing; print how many and why.")
    ] = False,
    blocklist: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Offensive words for the filters, one a line.")
    ] = None,
    data_dir: DataDir = None,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where downloads are kept (movies and chitchat).")
    ] = None,
) -> None:
    """Prepare the movies benchmark, the chitchat conversations, reversed strings, or your own JSONL files.

    \b
    Examples:
      rlhfjax data prepare movies
      rlhfjax data prepare my_chats --kind demonstration --split train=train.jsonl --split validation=val.jsonl
    """
    if blocklist and not dialogue_filters:
        raise ConfigError("--blocklist: expected --dialogue-filters with it")
    if dialogue_filters and kind != "demonstration":
        raise ConfigError(f"--dialogue-filters: expected --kind demonstration, got {kind or 'no kind'}")
    if split or kind:
        _prepare_files(name, split or [], kind, data_dir, dialogue_filters, blocklist)
    elif name in ("movies", "chitchat", "reversal"):
        from rlhfjax.data import benchmark, chitchat, movies, reversal
        from rlhfjax.data.datasets import default_data_dir

        known = {"movies": movies.Movies, "chitchat": chitchat.Chitchat, "reversal": reversal.Reversal}
        for folder in benchmark.prepare(known[name], data_dir or default_data_dir(), cache_dir, say):
            typer.echo(str(folder))
    else:
        raise ConfigError(
            f"{name}: expected movies, chitchat or reversal, or --kind KIND with --split SPLIT=FILE.jsonl (kinds: "
            f"{_KINDS})"
        )


def _prepare_files(
    name: str, splits: list[str], kind: str | None, data_dir: Path | None, filters: bool, blocklist: Path | None
) -> None:
    if not splits or not kind:
        missing = "--split SPLIT=FILE.jsonl" if kind else f"--kind ({_KINDS})"
        raise ConfigError(f"data prepare {name}: {missing} is missing")
    paths: dict[str, Path] = {}
    for text in splits:
        split, equals, path = text.partition("=")
        if not (split and equals and path) or split in paths:
            reason = "is given twice" if split in paths else "is not SPLIT=FILE.jsonl, such as train=chats.jsonl"
            raise ConfigError(f"--split {text} {reason}")
        paths[split] = Path(path)
    from rlhfjax.data.datasets import default_data_dir
    from rlhfjax.data.jsonl import prepare_jsonl

    where = data_dir or default_data_dir()
    if not filters:
        typer.echo(str(prepare_jsonl(paths, kind, name, where)))
        return
    from rlhfjax.data.dialogue import prepare_filtered

    folder, report = prepare_filtered(paths, name, where, blocklist)
    say(report)
    typer.echo(str(folder))


@data.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="CONFIG|SOURCE[@SPLIT]", help="A configuration, or a data set.")],
    stage: Annotated[str | None, typer.Argument(metavar="STAGE", help="The stage whose batch to show.")] = None,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(metavar="N", min=0, help="Which batch, or the first record to show.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=directory, help="The run with the tokenizer.")
    ] = None,
    data_dir: DataDir = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=f"Of a JSONL file: {_KINDS}.")] = None,
) -> None:
    """Show what a batch really holds, or a data set's records.

    \b
    Examples:
      rlhfjax data inspect quickstart reward --index 3
      rlhfjax data inspect movies/comparisons@train
    """
    if stage is None:
        return _show_records(target, index, data_dir, kind)
    loaded = configuration.load_config(target, pairs(overrides))
    known_stage("STAGE", stage, loaded)
    from rlhfjax import stages

    for row in stages.inspect_batch(loaded, stage, run_dir or Path("runs") / loaded.name, index):
        typer.echo(printable(row))
    return None


def _show_records(target: str, first: int, data_dir: Path | None, kind: str | None, count: int = 3) -> None:
    source, _, split = target.partition("@")
    from rlhfjax.data.datasets import default_data_dir, open_source

    records: Any = open_source(source, split or "train", data_dir or default_data_dir(), kind)
    typer.echo(f"{source}@{split or 'train'}: {len(records):,} records")
    for index in islice(range(first, len(records)), count):
        typer.echo(f"\n[{index}] {printable(json.dumps(records[index], ensure_ascii=False, indent=2))}")


def pairs(overrides: list[str] | None) -> list[str]:
    """The overrides of a command line, which may have none."""
    return overrides or []


def known_stage(option: str, stage: str | None, loaded: configuration.Run) -> None:
    """Raises ConfigError unless the recipe has the stage that an option names, if it names one."""
    given = ["tokenizer", *(name for name, section in loaded.stages if section is not None)]
    if stage is not None and stage not in given:
        raise ConfigError(f"{option} {stage}: expected a stage of {loaded.name}: {', '.join(given)}")
