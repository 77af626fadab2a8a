"""The verbs of datasets, and what they share with the others."""

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax import config as configuration
from rlhfjax import stores
from rlhfjax.cli.options import with_options
from rlhfjax.cli.tokenising import TokenOptions, directory, prepare_rows, show_rows
from rlhfjax.config.recipe import stages_of
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import printable, say

OPTIONS = {"pretty_exceptions_enable": False, "rich_markup_mode": None, "add_completion": False}
data = typer.Typer(no_args_is_help=True, help="Prepare datasets and look at them.", **OPTIONS)


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as stages.ppo.steps=200.")
]
DataDir = Annotated[Path | None, typer.Option(metavar="DIR", parser=directory, help="Where prepared datasets are.")]
_KINDS = "document, demonstration, comparison, prompt, rating or unpaired"
_SHOWN = 20_000  # characters of a record
_FORMATS = "JSON, JSON lines, CSV, TSV, text, Parquet, also .gz and .zst"
Layout = Annotated[str | None, typer.Option(metavar="NAME", help="The layout of the files, if not to be recognised.")]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="FIELD=THEIRS", help="Our field from one of theirs; may be repeated."),
]
SampleBy = Annotated[
    str,
    typer.Option(metavar="paragraph|line|document", help="What a document of a plain text is (document: the file)."),
]


@dataclass(frozen=True)
class ReadAs:
    """How files are read."""

    layout: Layout = None
    mapping: Map = None
    sample_by: SampleBy = "paragraph"


@dataclass(frozen=True)
class Filters:
    """What is left out of conversations."""

    dialogue_filters: Annotated[
        bool, typer.Option("--dialogue-filters", help="Drop exchanges that teach nothing; print how many and why.")
    ] = False
    blocklist: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Offensive words for the filters, one per line.")
    ] = None

    def check(self, kind: str | None) -> None:
        """Raises ConfigError where they do not go together."""
        if self.blocklist and not self.dialogue_filters:
            raise ConfigError("--blocklist: expected --dialogue-filters with it")
        if self.dialogue_filters and kind != "demonstration":
            raise ConfigError(f"--dialogue-filters: expected --kind demonstration, got {kind or 'no kind'}")


@data.command()
@with_options
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|SOURCE",
            help="movies, chitchat, reversal, arithmetic, or your own name; of tokens the source.",
        ),
    ],
    how: ReadAs,
    filters: Filters,
    tokens: TokenOptions,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPLIT=FILE", help=f"A split and its file, folder or pattern ({_FORMATS}); may be repeated."
        ),
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=f"What the files hold: {_KINDS}.")] = None,
    data_dir: DataDir = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=directory, help="Where downloads are kept (movies and chitchat)."),
    ] = None,
) -> None:
    """Prepare the movies benchmark, the chitchat conversations, reversed strings, sums, or your own files.

    With --tokenizer a file, folder or dataset becomes rows of tokens, once and for all: a run opens them at once,
    however many they are. The same command goes on with a preparation that was stopped.

    \b
    Examples:
      rlhfjax data prepare movies
      rlhfjax data prepare my_chats --kind demonstration --split train=train.jsonl --split validation=val.jsonl
      rlhfjax data prepare pretraining.jsonl --tokenizer runs/quickstart --pack 128 --processes 2
    """
    filters.check(kind)
    reading = _reading(how.layout, how.mapping, how.sample_by)
    if tokens.tokenizer:
        if split or filters.dialogue_filters:
            raise ConfigError("--tokenizer: expected SOURCE or SOURCE@SPLIT alone; prepare its records first")
        prepare_rows(_source_and_split(name), kind, data_dir, reading, tokens)
    elif given := tokens.given():
        raise ConfigError(f"{given}: expected --tokenizer DIR with it, which makes rows of tokens")
    elif split or kind:
        _prepare_files(name, split or [], kind, data_dir, reading, filters.dialogue_filters, filters.blocklist)
    elif name in ("movies", "chitchat", "reversal", "arithmetic"):
        from rlhfjax.data.datasets import default_data_dir
        from rlhfjax.data.sets import arithmetic, benchmark, chitchat, movies, reversal

        sets = (movies.Movies, chitchat.Chitchat, reversal.Reversal, arithmetic.Arithmetic)
        known = {one.name: one for one in sets}
        for folder in benchmark.prepare(known[name], data_dir or default_data_dir(), cache_dir, say):
            typer.echo(str(folder))
    else:
        raise ConfigError(
            f"{name}: expected movies, chitchat, reversal or arithmetic, or --kind KIND with --split SPLIT=FILE "
            f"(kinds: {_KINDS})"
        )


def _reading(layout: str | None, mapping: list[str] | None, sample_by: str) -> Any:
    from rlhfjax.record_kinds import reading_of

    fields: dict[str, str] = {}
    for text in mapping or []:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs) or ours in fields:
            reason = "names a field twice" if ours in fields else "is not FIELD=THEIRS, such as prompt=question"
            raise ConfigError(f"--map {text} {reason}")
        fields[ours] = theirs
    return reading_of(layout, fields, sample_by)


def _prepare_files(
    name: str,
    splits: list[str],
    kind: str | None,
    data_dir: Path | None,
    how: Any,
    filters: bool,
    blocklist: Path | None,
) -> None:
    if not splits or not kind:
        missing = "--split SPLIT=FILE" if kind else f"--kind ({_KINDS})"
        raise ConfigError(f"data prepare {name}: {missing} is missing")
    paths = _files_of(splits)
    from rlhfjax.data.datasets import default_data_dir
    from rlhfjax.data.preparing import prepare_files, what_was_made

    where = data_dir or default_data_dir()
    if filters:
        from rlhfjax.data.dialogue import prepare_filtered

        folder, report = prepare_filtered(paths, name, where, blocklist, how)
        say(report)
    else:
        folder = prepare_files(paths, kind, name, where, reading=how)
    for line in what_was_made(folder, name):
        say(line)
    typer.echo(str(folder))


def _files_of(splits: list[str]) -> dict[str, list[Path]]:
    """The files of each split, in the order that they are given; a folder or pattern alone brings splits of its own."""
    from rlhfjax.data.files import find_files

    paths: dict[str, list[Path]] = {}
    for text in splits:
        split, equals, path = text.partition("=")
        if equals and split and path:
            shards = find_files(path)
            held = {split: shards.of(split, path)}
        elif Path(text).is_dir():
            shards = find_files(text)
            held = shards.splits
        else:
            raise ConfigError(f"--split {text} is not SPLIT=FILE, such as train=chats.jsonl, and no folder with splits")
        for line in shards.words():
            say(f"{text}: {line}")
        for name, files in held.items():
            if twice := set(files) & set(paths.get(name, [])):
                raise ConfigError(f"--split {text} gives {twice.pop()} twice")
            paths.setdefault(name, []).extend(files)
    return paths


@data.command()
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG|SOURCE[@SPLIT]", help="A configuration, a dataset, or a file.")
    ],
    stage: Annotated[str | None, typer.Argument(metavar="STAGE", help="The stage whose batch to show.")] = None,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(metavar="N", min=0, help="Which batch, or the first record to show.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=directory, help="The run with the tokenizer.")
    ] = None,
    data_dir: DataDir = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=f"Of files: {_KINDS}.")] = None,
    layout: Layout = None,
    mapping: Map = None,
    sample_by: SampleBy = "paragraph",
) -> None:
    """Show what a batch really holds, or the records of a dataset or a file.

    \b
    Examples:
      rlhfjax data inspect quickstart reward --index 3
      rlhfjax data inspect movies/comparisons@train
    """
    if stage is None and run_dir:
        raise ConfigError("--run-dir: expected CONFIG STAGE with it; a dataset has no tokenizer")
    if stage and (data_dir or kind or layout or mapping):
        raise ConfigError(
            "--data-dir, --kind, --layout and --map: a configuration says them itself (data_dir, data); remove them"
        )
    if stage is None:
        return _show_records(target, index, data_dir, kind, _reading(layout, mapping, sample_by))
    loaded = configuration.load_config(target, pairs(overrides))
    known_stage("STAGE", stage, loaded)
    from rlhfjax import runs

    place = stores.here(run_dir or Path("runs") / loaded.name)
    for row in runs.inspect_batch(loaded, stage, place, index, report=say):
        typer.echo(printable(row))
    return None


def _show_records(target: str, first: int, data_dir: Path | None, kind: str | None, how: Any, count: int = 3) -> None:
    from rlhfjax.data.datasets import default_data_dir, open_source

    source, split = _source_and_split(target)
    if show_rows(source, data_dir or default_data_dir(), first, count):
        return
    records: Any = open_source(source, split, data_dir or default_data_dir(), kind, how)
    typer.echo(f"{source}@{split}: {len(records):,} records{records.kind and f', {records.kind}'}")
    for line in records.notes:
        say(line)
    if first >= len(records):
        raise ConfigError(f"--index {first}: expected at most {len(records) - 1}, the last record of {source}@{split}")
    for index in islice(range(first, len(records)), count):
        shown = printable(json.dumps(records[index], ensure_ascii=False, indent=2))
        cut = f"\n… and {len(shown) - _SHOWN:,} more characters" if len(shown) > _SHOWN else ""
        typer.echo(f"\n[{index}] {shown[:_SHOWN]}{cut}")


def _source_and_split(target: str) -> tuple[str, str]:
    """SOURCE@SPLIT; an @ in the path of something that is there belongs to the path."""
    if os.path.exists(target):
        return target, "train"
    source, _, split = target.rpartition("@") if "@" in target else (target, "", "")
    return source, split or "train"


def pairs(overrides: list[str] | None) -> list[str]:
    """The overrides of a command line, which may have none."""
    return overrides or []


def known_stage(option: str, stage: str | None, loaded: configuration.Run) -> None:
    """Raises ConfigError unless the recipe has the stage that an option names, if it names one."""
    given = stages_of(loaded)
    if stage is not None and stage not in given:
        raise ConfigError(f"{option} {stage}: expected a stage of {loaded.name}: {', '.join(given)}")
