"""The tokenizer that a run was given, and the chat template in it, against the copy that the run kept."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from rlhfjax.config import Run
from rlhfjax.errors import RlhfjaxError
from rlhfjax.stages.tokenizer import given_tokenizer
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer

_AROUND = 30  # characters before and after the first that is another


def other_tokenizer(run: Run, run_dir: Path) -> Iterator[str]:
    """A line where the tokenizer that was given is another by now, or the first line of its template that is.

    Nothing where the run trained its own: that one is made of its data.
    """
    source = "tokenizer.path" if run.tokenizer.path else "model.checkpoint"
    try:
        now = given_tokenizer(run)
        if now is None:
            return
        then = load_tokenizer(run_dir / "tokenizer")
    except RlhfjaxError as error:
        yield str(error)
        return
    if template := other_template(_template(then), _template(now)):
        yield f"chat template of {source}: {template}"
    elif then.fingerprint != now.fingerprint:
        yield f"tokenizer of {source}: expected SHA-256 {then.fingerprint[:12]}…, got {now.fingerprint[:12]}…"


def other_template(then: str, now: str) -> str:
    """`line N: expected …, got …`, where the texts begin to differ; empty where they are equal."""
    for number, (old, new) in enumerate(zip_longest(then.split("\n"), now.split("\n")), 1):
        if old != new:
            return f"line {number}: expected {_excerpt(old, new)}, got {_excerpt(new, old)}"
    return ""


def _excerpt(text: str | None, other: str | None) -> str:
    if text is None or other is None:
        return "nothing" if text is None else repr(text[: 2 * _AROUND])
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    first, end = max(same - _AROUND, 0), same + _AROUND
    return f"{'…' if first else ''}{text[first:end]!r}{'…' if end < len(text) else ''}"


def _template(tokenizer: AnyTokenizer) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return "" if template is None else template.source
