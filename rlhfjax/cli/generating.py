"""`rlhfjax generate`: the answers of a model, drawn or searched for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from rlhfjax.cli import asking
from rlhfjax.cli.asking import Date, Messages, PromptText, Template
from rlhfjax.cli.checking import NoVerify
from rlhfjax.cli.options import with_options
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import printable, say


@dataclass(frozen=True)
class Draws:
    """How responses are drawn: the keywords of `Model.generate`."""

    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")] = 1.0
    top_k: Annotated[int, typer.Option(metavar="K", min=0, help="Only the K likeliest tokens; 0: all.")] = 0
    top_p: Annotated[float, typer.Option(metavar="P", min=0, max=1, help="Only the likeliest with sum P.")] = 1.0
    min_p: Annotated[
        float, typer.Option(metavar="P", min=0, max=1, help="Only those P times as likely as the likeliest; 0: all.")
    ] = 0.0
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text that ends a response before it; may be repeated.")
    ] = None
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Equal seeds draw equal responses.")] = 0
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Responses to draw.")] = 1
    speculate: Annotated[
        int, typer.Option(metavar="K", min=0, help="K draft tokens per call: the same answers, from fewer calls.")
    ] = 0

    @property
    def keywords(self) -> dict[str, Any]:
        """Those that `Model.generate` is asked with; what was not asked for is left out of the later ones."""
        later = ("min_p", "stop", "speculate")
        return {name: value for name, value in asdict(self).items() if value or name not in later}


@dataclass(frozen=True)
class Search:
    """How the best response is searched for, if it is."""

    beams: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Search for the best response, N open at a time.")
    ] = None
    length_penalty: Annotated[
        float | None, typer.Option(metavar="A", min=0, help="Of the search; above 0 favours length.  [default: 0.6]")
    ] = None

    @property
    def keywords(self) -> dict[str, Any]:
        """Those that `Model.beam_search` is asked with."""
        return {"beams": self.beams, "length_penalty": 0.6 if self.length_penalty is None else self.length_penalty}


@with_options
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
    draws: Draws = Draws(),
    search: Search = Search(),
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
    _one_way_to_generate(search, draws)
    if prompts and (prompt is not None or message):
        raise ConfigError("--prompts: expected it without --prompt and --message")
    given = None if prompts else asking.prompt_of(prompt, message, "--prompts")
    model = asking.load(checkpoint, date, template, no_verify)
    held = asking.records_of(prompts, "prompt") if prompts else []
    asked = held if prompts else [given]
    with asking.named(prompts):
        if search.beams:
            found = model.beam_search(asked, max_new_tokens=max_new_tokens, **search.keywords)
            answers = [[completion] for completion in found]
        else:
            answers = model.generate(asked, max_new_tokens=max_new_tokens, **draws.keywords)
    asking.write_answers(held, answers)
    if not prompts:
        _print_answers(answers[0], draws)


def _one_way_to_generate(search: Search, draws: Draws) -> None:
    if search.beams and draws != Draws():
        raise ConfigError(
            "--beams: a search draws nothing; remove --temperature, --top-k, --top-p, --min-p, --stop, --seed, "
            "--n and --speculate"
        )
    if search.length_penalty is not None and not search.beams:
        raise ConfigError("--length-penalty: expected --beams with it")


def _print_answers(completions: Sequence[Any], draws: Draws) -> None:
    for number, completion in enumerate(completions, 1):
        mark = f"[{number}] " if draws.n > 1 else ""
        typer.echo(f"{mark}{printable(completion.text)}")
    if draws.speculate and (calls := sum(completion.calls or 0 for completion in completions)):
        tokens = sum(len(completion.tokens) - 1 for completion in completions)
        say(f"{tokens} tokens after the first, {tokens / calls:.2f} a call of the model")
