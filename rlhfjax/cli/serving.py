"""`rlhfjax serve`: models behind HTTP, as OpenAI's clients know it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax.cli import asking
from rlhfjax.cli.asking import Date, Template
from rlhfjax.cli.checking import NoVerify
from rlhfjax.cli.options import with_options
from rlhfjax.errors import ConfigError
from rlhfjax.terminal import say

_EVERY = 10.0  # seconds between two looks whether a model was replaced


@dataclass(frozen=True)
class Bounds:
    """How much of everything is taken: the fields of `serving.limits.Limits`."""

    slots: Annotated[int, typer.Option(metavar="N", min=1, help="Responses that are written at a time.")] = 16
    context: Annotated[
        int | None,
        typer.Option(metavar="T", min=2, help="Tokens of a prompt and its response.  [default: all a model can read]"),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="Tokens of a response.  [default: what the context leaves]")
    ] = None
    queue: Annotated[int, typer.Option(metavar="N", min=0, help="Responses that may wait; others get a 429.")] = 64
    seconds: Annotated[float, typer.Option(metavar="S", min=1, help="A response that takes longer ends there.")] = 600.0


@with_options
def serve(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="[NAME=]CKPT...", help="Checkpoints, stages or runs, each a model.")
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="One that others reach needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", envvar="RLHFJAX_TOKEN", help="What clients give as their API key."),
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep votes of the chat page there, as records for a recipe.")
    ] = None,
    bounds: Bounds = Bounds(),
    moderation: Annotated[
        str | None, typer.Option(metavar="POLICY", help="A policy's YAML file, or `default`: both sides are judged.")
    ] = None,
    template: Template = None,
    date: Date = None,
    no_verify: NoVerify = False,
) -> None:
    """Serve models to OpenAI's clients, and a chat page to people. Needs the extra `serve`.

    \b
    Examples:
      rlhfjax serve runs/quickstart --moderation default --feedback votes
      rlhfjax serve chat=runs/smollm2_chat sft=runs/smollm2_chat/sft reward=runs/smollm2_chat/reward --port 8080
    """
    try:
        from rlhfjax.serving import running
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: expected the extra `serve`, got no {error.name}; pip install '.[serve]'") from None
    from rlhfjax.moderation import open_policy
    from rlhfjax.serving.feedback import Feedback
    from rlhfjax.serving.limits import Limits
    from rlhfjax.serving.replacing import Replacing

    votes = Feedback(feedback) if feedback else None
    named, access = running.named(checkpoints), running.access_of(host, token)
    moderator = open_policy(moderation) if moderation else None
    taken = running.listen(host, port)
    limits = Limits(bounds.slots, bounds.context, bounds.max_tokens, bounds.queue, seconds=bounds.seconds)

    def load(path: str, bases: Any = None) -> Any:
        return asking.load(path, date, template, no_verify, bases)

    models = _loaded(named, load)
    with running.opened(models, limits, say, moderator) as hall:
        hall.feedback = votes
        shown = f"[{host}]" if ":" in host else host
        say(f"ready: http://{shown}:{taken.getsockname()[1]} talks, and /v1 serves {', '.join(named)}")
        replacing = Replacing(hall, named, load, say)
        replacing.start(_EVERY)
        running.server_of(hall, access).run(sockets=[taken])


def _loaded(named: Mapping[str, str], load: Callable[..., Any]) -> dict[str, Any]:
    """All models; those with adapters over one base share it."""
    from rlhfjax.training.checkpoint import Bases

    bases = Bases()
    return {name: load(path, bases) for name, path in named.items()}
