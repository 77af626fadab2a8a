"""Questions to a model on the command line: texts, messages and files of records; and the verb `score`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax.cli.checking import NoVerify
from rlhfjax.config.overrides import parse_override
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.integrity import unverified
from rlhfjax.terminal import printable, say

ROLES = ("system", "developer", "user", "assistant", "tool")

PromptText = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What the model continues.")]
Messages = Annotated[
    list[str] | None,
    typer.Option(
        "--message",
        metavar="[ROLE=]TEXT",
        help="A message of a conversation, of the user if not said; may be repeated.",
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        metavar="KEY=VALUE",
        help="For the chat template, such as enable_thinking=false.  [default: as trained]",
    ),
]
Date = Annotated[
    str | None,
    typer.Option("--date", metavar="YYYY-MM-DD", help="What a template writes for today.  [default: as trained]"),
]


def prompt_of(prompt: str | None, messages: Sequence[str] | None, file: str) -> Any:
    """The prompt of a command line, a text or messages. Raises ConfigError unless one of the two is given.

    `file` is the option that takes several from a file, for the message.
    """
    if prompt is not None and not messages:
        return prompt
    if messages and prompt is None:
        return [_message(text) for text in messages]
    got = "two of them" if messages else "none"
    raise ConfigError(f"expected one of --prompt TEXT, --message TEXT and {file} FILE, got {got}")


def _message(text: str) -> dict[str, str]:
    role, parts, content = text.partition("=")
    return {"role": role, "content": content} if parts and role in ROLES else {"role": "user", "content": text}


def load(checkpoint: str, date: str | None, template: Sequence[str] | None, no_verify: bool, bases: Any = None) -> Any:
    """The model of a command line, speaking as it says; adapters share what `bases` holds."""
    import rlhfjax
    from rlhfjax.host.compile_cache import use_compile_cache

    use_compile_cache(say)
    variables = {".".join(map(str, key)): value for key, value in map(parse_override, template or ())}
    given = {"date": date, "chat_template_kwargs": variables, "bases": bases}
    with unverified(no_verify):
        return rlhfjax.load(checkpoint, **{name: value for name, value in given.items() if value})


def records_of(source: str, kind: str) -> list[dict[str, Any]]:
    """The records of a file or a dataset, SOURCE or SOURCE@SPLIT."""
    from rlhfjax.data.datasets import default_data_dir, open_source

    name, split = (source, "train") if Path(source).expanduser().is_file() else _split(source)
    return list(open_source(name, split, default_data_dir(), kind=kind))


def _split(source: str) -> tuple[str, str]:
    name, _, split = source.partition("@")
    return name, split or "train"


@contextmanager
def named(source: str | None) -> Iterator[None]:
    """Errors of data inside are of this file; they have the place of the row."""
    try:
        yield
    except DataError as error:
        if source is None:
            raise
        raise DataError(f"{source}: {error}") from error


def write_answers(records: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Any]]) -> None:
    """Each record with the responses to it, and why each ended; nothing where there are no records."""
    for record, completions in zip(records, answers, strict=False):
        ends = [completion.finish_reason for completion in completions]
        write_line({**record, "responses": [completion.text for completion in completions], "finish_reasons": ends})


def write_line(record: Mapping[str, Any]) -> None:
    """One record of the output, as JSON on a line."""
    typer.echo(printable(json.dumps(record, ensure_ascii=False)))


def score(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A reward model: a checkpoint, or a stage's directory.")
    ],
    prompt: PromptText = None,
    message: Messages = None,
    response: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A response to score; may be repeated.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score every response of a file or dataset; writes JSON lines.")
    ] = None,
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="Of the records: comparison, demonstration or unpaired.")
    ] = "comparison",
    template: Template = None,
    date: Date = None,
    no_verify: NoVerify = False,
) -> None:
    """Print a reward model's score of each response, or a file's records with their scores.

    \b
    Examples:
      rlhfjax score runs/quickstart/reward --prompt "Review: the film is" --response " warm." --response " dull."
      rlhfjax score runs/quickstart/reward --records rankings.jsonl
    """
    if bool(records) == bool(response) or (records and (prompt is not None or message)):
        raise ConfigError("score: expected --records FILE, or --response with --prompt or --message")
    if kind not in ("comparison", "demonstration", "unpaired"):
        raise ConfigError(f"--kind: expected comparison, demonstration or unpaired, got {kind!r}")
    asked = None if records else prompt_of(prompt, message, "--records")
    model = load(checkpoint, date, template, no_verify)
    if asked is not None and response:
        for value in model.score([asked] * len(response), response):
            typer.echo(f"{value:.6g}")
        return
    held = records_of(str(records), kind)
    pairs = [_encoded(model, record, f"{records} row {row}") for row, record in enumerate(held)]
    values = iter(model.score([asked for asked, ids in pairs for _ in ids], [one for _, ids in pairs for one in ids]))
    for record, (_, responses) in zip(held, pairs, strict=True):
        write_line({**record, "scores": [round(float(next(values)), 6) for _ in responses]})


def _encoded(model: Any, record: dict[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
    from rlhfjax.text.chat import encode_responses

    asked, texts = _asked_and_answers(record)
    try:
        return encode_responses(model.tokenizer, asked, texts)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _asked_and_answers(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A record's prompt, and the responses that it holds."""
    texts = record.get("responses") or ([record["completion"]] if "completion" in record else None)
    if texts is not None:
        return record, texts
    *before, answer = record["messages"]
    return {**record, "messages": before}, [answer["content"]]
