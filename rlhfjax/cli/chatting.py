"""`rlhfjax chat`: a conversation in the terminal, or with a script on stdin."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhfjax.cli import asking
from rlhfjax.cli.asking import Date, Template
from rlhfjax.cli.checking import NoVerify
from rlhfjax.cli.options import with_options
from rlhfjax.errors import ConfigError, DataError, RlhfjaxError
from rlhfjax.host import stopping
from rlhfjax.terminal import printable, say

HELP = """/system TEXT   another system message, or none
/retry         another answer in the place of the last
/undo          takes the last message and its answer back
/why           how sure the model was of each token of its answer, and what else was likely
/save FILE     the conversation as a line of JSON, which a recipe reads as a demonstration
/load FILE     goes on with a saved conversation
/help, /quit   a message that begins with / is written with two; a line that ends with \\ goes on"""


@dataclass(frozen=True)
class Draws:
    """How answers are drawn."""

    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest answer.  [default: 512, or half of the history]")
    ] = None
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")] = 1.0
    top_p: Annotated[float, typer.Option(metavar="P", min=0, max=1, help="Only the likeliest with sum P.")] = 1.0
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Equal seeds and messages get equal answers.")] = 0

    @property
    def keywords(self) -> dict[str, Any]:
        own = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return own | ({"max_new_tokens": self.max_new_tokens} if self.max_new_tokens else {})


@with_options
def chat(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, a stage's directory, or a run's (its last policy).")
    ],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    history: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens that it reads, whole turns, with room for its answer.")
    ] = 4000,
    moderation: Annotated[
        str | None, typer.Option(metavar="POLICY", help="A policy for both sides, a file or `default`.")
    ] = None,
    draws: Draws = Draws(),
    template: Template = None,
    date: Date = None,
    no_verify: NoVerify = False,
) -> None:
    """Talk with a model. Answers come as they are written; /help says what else can be done.

    Lines of a script on stdin are messages and commands, and answers go to stdout. Ctrl-C ends an answer, Ctrl-D the
    conversation.

    \b
    Examples:
      rlhfjax chat runs/quickstart --max-new-tokens 24
      printf 'Review: the film is\\n/why\\n' | rlhfjax chat runs/quickstart --max-new-tokens 24
    """
    moderator = None
    if moderation:
        from rlhfjax.moderation import open_policy

        moderator = open_policy(moderation)
    model = asking.load(checkpoint, date, template, no_verify)
    from rlhfjax.api.dialogue import Dialogue

    Talk(Dialogue(model, system, history, moderator, **draws.keywords)).go()


class Talk:
    """What is typed, and what is shown."""

    def __init__(self, dialogue: Any):
        self._dialogue, self._file = dialogue, None
        self._live = sys.stdin.isatty()
        self._dropped = 0
        self._commands: dict[str, Callable[[str], Any]] = {
            "system": dialogue.system,
            "retry": lambda _: self._show(dialogue.retry()),
            "undo": lambda _: dialogue.undo(),
            "why": lambda _: self._why(),
            "save": self._save,
            "load": self._load,
            "help": lambda _: say(HELP),
        }

    def go(self) -> None:
        """Until the input ends. An expected error ends a script, and is told to a person, who goes on."""
        if self._live:
            import readline  # noqa: F401  (arrow keys and earlier lines)

            say("/help says what can be done; Ctrl-C ends an answer, Ctrl-D the conversation")
        with stopping.interrupts() if self._live else nullcontext():
            for text in self._typed():
                if text == "/quit":
                    return
                try:
                    self._do(text)
                except (RlhfjaxError, KeyboardInterrupt) as error:
                    if not self._live:
                        raise
                    say(f"error: {error}" if isinstance(error, RlhfjaxError) else "")

    def _typed(self) -> Iterator[str]:
        """Messages and commands; lines that end with a backslash are joined."""
        lines: list[str] = []
        while True:
            try:
                line = input("> " if not lines else ". ") if self._live else next(sys.stdin).rstrip("\n")
            except (EOFError, StopIteration):
                break
            except KeyboardInterrupt:  # what was typed so far is dropped
                typer.echo("")
                lines = []
                continue
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                yield "\n".join(lines)
                lines = []
        if lines:
            yield "\n".join(lines)

    def _do(self, text: str) -> None:
        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            if name not in self._commands:
                raise ConfigError(f"/{name}: expected a command, one of /{', /'.join(self._commands)}, /quit")
            self._commands[name](rest.strip())
            return
        self._show(self._dialogue.ask(text[1:] if text.startswith("//") else text))

    def _show(self, pieces: Any) -> None:
        if self._dialogue.dropped > self._dropped:
            say(f"(the first {self._dialogue.dropped} messages no longer fit, and the model does not read them)")
        self._dropped = self._dialogue.dropped
        try:
            with closing(pieces):  # what was written of an answer that is left is kept
                for piece in pieces:
                    sys.stdout.write(printable(piece))
                    sys.stdout.flush()
        finally:
            typer.echo("")

    def _why(self) -> None:
        for place in self._dialogue.why():
            others = ", ".join(f"{token} {share:.0%}" for token, share in place.likeliest if token != place.token)
            typer.echo(printable(f"{place.token:16} {place.probability:4.0%}   {others}"))

    def _save(self, name: str) -> None:
        path = _named(name, "save")
        if path.exists() and path != self._file:
            raise ConfigError(f"{path}: exists already; choose another file")
        text = json.dumps({"messages": self._dialogue.messages}, ensure_ascii=False) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}; choose another file") from None
        self._file = path
        say(f"wrote {path}")

    def _load(self, name: str) -> None:
        path = _named(name, "load")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            messages = record["messages"]
        except OSError as error:
            raise ConfigError(f"{path}: expected a saved conversation, got {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: expected one line of JSON with `messages`, got something else") from None
        self._dialogue.load(messages)
        self._file = path
        say(f"{len(messages)} messages of {path}")


def _named(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"/{command}: expected the name of a file after it")
    return Path(name).expanduser()
