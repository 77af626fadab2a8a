"""Rows of tokens on the command line: options of `data prepare`, and what `data inspect` shows of them."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax.config.overrides import parse_override
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import printable, say


def directory(text: str) -> Path:
    """A path that was given; nothing, as a variable that is not set gives, is not the current directory."""
    if not text:
        raise typer.BadParameter("expected a directory, got nothing; give its path (the one of this terminal is .)")
    return Path(text)


_DROP = "error|drop"


@dataclass(frozen=True)
class TokenOptions:
    """What rows of tokens are made like."""

    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", parser=directory, help="Makes rows of tokens: a tokenizer, or a run or checkpoint with one."
        ),
    ] = None
    pack: Annotated[
        int | None, typer.Option(metavar="LENGTH", help="Pack documents or demonstrations into rows of so many tokens.")
    ] = None
    length: Annotated[
        int | None, typer.Option(metavar="LENGTH", help="A row for each record, of at most so many tokens.")
    ] = None
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=directory, help="Where to.  [default: in the data directory]")
    ] = None
    processes: Annotated[int | None, typer.Option(metavar="N", min=1, help="How many.  [default: one a CPU]")] = None
    train_on: Annotated[str | None, typer.Option(metavar="last|all", help="Answers that are targets.")] = None
    overlong: Annotated[str | None, typer.Option(metavar=_DROP, help="Of records that are longer.")] = None
    refused: Annotated[str | None, typer.Option(metavar=_DROP, help="Of those that cannot be written.")] = None
    template: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the chat template; may be repeated.")
    ] = None
    date: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="What a template writes for today.")] = None

    def given(self) -> str | None:
        """The first of the options that was given."""
        return next((f"--{each.name.replace('_', '-')}" for each in fields(self) if getattr(self, each.name)), None)


def prepare_rows(
    source: tuple[str, str], kind: str | None, data_dir: Path | None, reading: Any, options: TokenOptions
) -> None:
    """Make the rows, and say what was made."""
    from rlhfjax.data.datasets import default_data_dir
    from rlhfjax.data.tokens.plan import Rows, kind_of
    from rlhfjax.data.tokens.preparing import prepare_tokens, what_was_made

    if (options.pack is None) == (options.length is None):
        raise ConfigError("--tokenizer: expected either --pack LENGTH or --length LENGTH with it")
    name, split = source
    where = data_dir or default_data_dir()
    chosen = {name: getattr(options, name) for name in ("train_on", "overlong", "refused") if getattr(options, name)}
    length = options.pack or options.length or 0
    rows = Rows(kind or kind_of(name, split, where, reading), length, packed=options.pack is not None, **chosen)
    folder = prepare_tokens(
        name,
        rows,
        _tokenizer(options),
        where,
        split=split,
        reading=reading,
        to=options.to,
        processes=options.processes or _cpus(),
        report=say,
    )
    for line in what_was_made(folder):
        say(line)
    typer.echo(str(folder))


def _cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenizer(options: TokenOptions) -> Any:
    """The tokenizer of a directory, a run or a checkpoint, with the chat settings of the command line."""
    from rlhfjax.text.chat_writing import ChatSettings
    from rlhfjax.text.loading import load_tokenizer

    path = options.tokenizer
    assert path is not None
    inside = path / "tokenizer"
    try:
        made = load_tokenizer(inside if inside.is_dir() else path)
    except ConfigError:
        made = _of_checkpoint(path)
        if made is None:
            raise
    variables = {".".join(map(str, key)): value for key, value in map(parse_override, options.template or ())}
    settings = {"chat_template_kwargs": variables, "date": options.date}
    try:
        return made.with_chat(ChatSettings.from_json(settings))
    except ValueError:
        raise ConfigError(f"--date {options.date}: expected a date such as 2026-01-31") from None


def _of_checkpoint(path: Path) -> Any:
    from rlhfjax.training.checkpoint import find_checkpoint, read_meta, tokenizer_of

    try:
        return tokenizer_of(read_meta(find_checkpoint(path)))
    except ConfigError:
        return None


def show_rows(source: str, data_dir: Path, first: int, count: int) -> bool:
    """Show some rows of tokens, if that is what a source names."""
    from rlhfjax.data.tokens.folder import read_plan, token_folder, tokenizer_of
    from rlhfjax.data.tokens.items import texts_of
    from rlhfjax.data.tokens.opening import TokenShards

    folder = token_folder(source, data_dir)
    if folder is None:
        return False
    shards, tokenizer = TokenShards(folder), tokenizer_of(folder, read_plan(folder))
    typer.echo(f"{source}: {len(shards):,} rows of tokens, {shards.kind}")
    for line in shards.notes:
        say(line)
    if first >= len(shards):
        raise ConfigError(f"--index {first}: expected at most {len(shards) - 1}, the last row of {source}")
    for row in range(first, min(first + count, len(shards))):
        typer.echo(f"\n[{row}]")
        for text in texts_of(shards, row):
            typer.echo(printable("  " + " ".join(tokenizer.pieces(text))))
    return True
