"""The files that rewards name: read once, known by their digests, and watched for edits while a run goes on.

Only the configuration that somebody runs names code. A function's text is kept, so that a worker which replaces another
loads the same. A command is what lies on the disk whenever it is run; so an edit of it ends the run.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.fetch import file_sha256
from rlhfjax.moderation import policy_files
from rlhfjax.places import expanded


@dataclass(frozen=True)
class CodeFile:
    """One file, as the configuration names it, with what it was when it was read."""

    name: str
    sha256: str
    stamp: tuple[int, int]  # size, and the time of the last change in nanoseconds

    def edited(self) -> bool:
        """Whether the file holds something else now, or is gone."""
        try:
            return _stamp(self.name) != self.stamp and file_sha256(expanded(self.name)) != self.sha256
        except OSError:
            return True


def _stamp(name: str) -> tuple[int, int]:
    stat = os.stat(expanded(name))
    return stat.st_size, stat.st_mtime_ns


def files_of(term: Any) -> list[CodeFile]:
    """The files of a reward: that of a function, those among the words of a command, a policy with its rules.

    Raises ConfigError.
    """
    if term.kind == "function":
        return [_code_file(term.function.rpartition(":")[0])]
    if term.kind == "command":
        program, *rest = term.command
        own = [program] if "/" in program else []  # others are found on PATH, and are the machine's
        return [_code_file(name) for name in [*own, *(word for word in rest if os.path.isfile(word))]]
    if term.kind == "moderation":
        return [_code_file(name) for name in policy_files(term.moderation.policy)]
    return []


def _code_file(name: str) -> CodeFile:
    try:
        return CodeFile(name, file_sha256(expanded(name)), _stamp(name))
    except OSError as error:
        raise ConfigError(
            f"rewards: {name}: expected a readable file, got {error.strerror}; relative paths are of {os.getcwd()}, "
            "the directory that the run is started in"
        ) from None


def source_of(name: str) -> tuple[str, CodeFile]:
    """The text of a Python file, and the file it was read from. Raises ConfigError."""
    file = _code_file(name)
    try:
        content = Path(expanded(name)).read_bytes()
        text = importlib.util.decode_source(content)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"rewards: {name}: expected a Python file, got {error}") from None
    return text, CodeFile(name, hashlib.sha256(content).hexdigest(), file.stamp)


def facts_of(terms: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """By the name of each reward its kind and weight, and what of it is code: file or argv, with SHA-256.

    Raises ConfigError for a file that cannot be read.
    """
    return {term.title: {"kind": term.kind, "weight": term.weight, **_code(term)} for term in terms}


def _code(term: Any) -> dict[str, Any]:
    named = {"function": term.function} if term.kind == "function" else {}
    named |= {"argv": list(term.command)} if term.kind == "command" else {}
    named |= {"policy": term.moderation.policy} if term.kind == "moderation" else {}
    return named | {"sha256": {file.name: file.sha256 for file in files_of(term)}} if named else {}


def digests_of(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """SHA-256 of each file in the facts of rewards, by its name in the configuration."""
    return {name: digest for fact in facts.values() for name, digest in fact.get("sha256", {}).items()}


def refuse_other_code(stage: str, before: Sequence[Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises DataError where a stage that has begun would go on with other code of its rewards.

    `before` are the facts that its attempts have noted, oldest first, `now` those of this one.
    """
    for name, digest in digests_of(now).items():
        known = [digests[name] for facts in before if name in (digests := digests_of(facts))]
        if known and known[-1] != digest:
            raise DataError(
                f"stages.{stage}.rewards: {name} has changed since this stage began: expected SHA-256 "
                f"{known[-1][:12]}…, got {digest[:12]}…; put the file back, or do the stage again with --from {stage}"
            )


def edits(files: Mapping[str, CodeFile]) -> Iterator[str]:
    """The names of the rewards whose file was edited since it was read."""
    return (name for name, file in files.items() if file.edited())
