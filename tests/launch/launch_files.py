"""The files of launch/: the command that renders each, and every command line of rlhfjax in them.

`python -m tests.launch.launch_files` (`make launch-files`) renders them anew.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml
from typer.testing import CliRunner

from rlhfjax.cli import app

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(path for path in LAUNCH.rglob("*") if path.is_file())
_ENDS = {"&&", "||", ";", "|", "&", "(", ")"}


def command_of(path: Path) -> list[str] | None:
    """The words after `rlhfjax` of the command in a file's first comment; None where nothing renders it."""
    for line in path.read_text(encoding="utf-8").splitlines()[:2]:
        if line.startswith("# rlhfjax launch render "):
            return shlex.split(line)[2:]
    return None


def rendered(command: list[str]) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return result.stdout


def command_lines(path: Path) -> list[list[str]]:
    """Every command line of rlhfjax in a file, in comments and inside of quotes, too."""
    text = path.read_text(encoding="utf-8")
    lines = (line.removeprefix("# ") for line in text.replace("\\\n", " ").splitlines() if not _is_prose(line))
    found = [words for line in lines for words in _in_shell(line)]
    if path.suffix in (".yaml", ".yml"):
        for document in yaml.safe_load_all(text):
            found += _in_lists(document)
    return found


def _is_prose(line: str) -> bool:
    return line.lstrip().startswith("#") and not line.startswith("# rlhfjax ")


def _in_shell(line: str) -> Iterator[list[str]]:
    if "rlhfjax " not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:  # the first or last line of a quotation
        return
    for i, word in enumerate(words):
        rest = words[i + 1 :]
        if word == "rlhfjax" and rest and rest[0].replace("-", "x").isalpha() and not rest[0].startswith("-"):
            end = next((j for j, each in enumerate(rest) if each in _ENDS), len(rest))
            yield [word, *rest[:end]]
        elif word != line:
            yield from _in_shell(word)


def _in_lists(value: object) -> Iterator[list[str]]:
    if isinstance(value, list) and value and value[0] == "rlhfjax":
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _in_lists(each)


if __name__ == "__main__":
    for file in FILES:
        if command := command_of(file):
            file.write_text(rendered(command), encoding="utf-8")
            print(f"wrote {file.relative_to(LAUNCH.parent)}")
