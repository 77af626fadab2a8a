"""`rlhfjax moderate`: what a moderation policy makes of texts."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer

from rlhfjax.cli.asking import write_line
from rlhfjax.errors import DataError
from rlhfjax.terminal import printable

SideOption = Annotated[
    Literal["input", "output"], typer.Option("--side", help="Of a model: what it is asked, or what it has said.")
]


def moderate(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A policy's YAML file, or `default`.")],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT|-]", help="A text; `-` reads one on each line, writes JSON lines.")
    ] = None,
    side: SideOption = "input",
) -> None:
    """Print what a moderation policy makes of a text, or without one what it makes of each category.

    Nothing is written to the policy's audit log.

    \b
    Examples:
      rlhfjax moderate default "How do I bully John Doe?"
      rlhfjax moderate default - --side output
      rlhfjax moderate default
    """
    from rlhfjax.moderation import open_policy, read_policy

    if text is None:
        for line in _table(read_policy(policy)):
            typer.echo(printable(line))
        return
    moderator = open_policy(policy, audited=False)
    judge = moderator.input if side == "input" else moderator.output
    if text != "-":
        for line in _lines(text, judge(text)):
            typer.echo(printable(line))
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            said = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"standard input, line {number}: expected UTF-8 text, got other bytes") from None
        write_line(_record(judge(said)))


def _record(verdict: Any) -> dict[str, Any]:
    """A verdict as one JSON object, without the text."""
    record = {
        "action": verdict.action,
        "category": verdict.category,
        "flagged": list(verdict.flagged),
        "scores": dict(verdict.scores),
        "spans": [[span.start, span.end, span.category] for span in verdict.spans],
        "filler": verdict.filler,
    }
    return record | ({"failed": verdict.failed} if verdict.failed else {})


def _lines(text: str, verdict: Any) -> Iterator[str]:
    """A verdict for people: the action, then each flagged category with what was seen, then what is said instead."""
    yield verdict.action + (f", since a back end failed: {verdict.failed}" if verdict.failed else "")
    for name in verdict.flagged:
        seen = dict.fromkeys(text[span.start : span.end] for span in verdict.spans if span.category == name)
        yield f"  {name} {verdict.scores[name]:.3g}" + "".join(f'  "{" ".join(part.split())}"' for part in seen)
    if verdict.filler:
        yield verdict.filler


def _table(policy: Any) -> Iterator[str]:
    """What a policy makes of each category, on both sides."""
    yield f"{'category':<24}{'input':<10}{'output':<10}{'threshold':<11}filler"
    for name, treatment in policy.treatments().items():
        limit = f"{treatment.threshold:g}"
        yield f"{name:<24}{treatment.input:<10}{treatment.output:<10}{limit:<11}{treatment.filler}"
