"""Files of rules: named lists of phrases, and for each category patterns that are rows of these."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rlhfjax.config.sections import Fraction, Section
from rlhfjax.errors import ConfigError
from rlhfjax.moderation.reading import ByCategory, read_section
from rlhfjax.moderation.rules import Pattern, Phrase, phrase_of

Text = Annotated[str, Field(min_length=1)]
Phrases = Text | Annotated[list[Text], Field(min_length=1)]  # the name of a list, or phrases
SHIPPED = Path(__file__).with_name("rules.yaml")


class PatternSection(Section):
    """One phrase of each of `find` in this order, at most `within` words between two, and none of `unless` there."""

    find: Annotated[list[Phrases], Field(min_length=1, max_length=5)]
    within: Annotated[int, Field(ge=0, le=20)] = 3
    unless: Phrases | None = None
    score: Fraction = 1.0


class RuleFile(Section):
    """A file of rules."""

    lists: dict[str, Annotated[list[Text], Field(min_length=1)]] = {}
    patterns: ByCategory[Annotated[list[PatternSection], Field(min_length=1)]]


def read_rules(path: Path) -> list[Pattern]:
    """The patterns of a file. Raises ConfigError that names the file, the line and the key."""
    file, where = read_section(path, RuleFile, "rules (lists, patterns)")
    patterns = []
    for category, sections in file.patterns.items():
        for number, section in enumerate(sections):
            here = f"{where('patterns', category, number)}patterns.{category}.{number}"
            parts = tuple(_phrases(given, file.lists, f"{here}.find") for given in section.find)
            unless = _phrases(section.unless, file.lists, f"{here}.unless") if section.unless else ()
            patterns.append(Pattern(category, parts, section.within, unless, section.score))
    return patterns


def _phrases(given: str | list[str], lists: Mapping[str, list[str]], where: str) -> tuple[Phrase, ...]:
    if isinstance(given, str):
        if given not in lists:
            near = difflib.get_close_matches(given, lists, n=1)
            hint = f"did you mean {near[0]}?" if near else "phrases of their own stand in [ ]"
            raise ConfigError(f"{where}: expected one of the lists ({', '.join(lists) or 'none'}), got {given}; {hint}")
        given = lists[given]
    phrases = [phrase_of(text) for text in given]
    for text, phrase in zip(given, phrases, strict=True):
        if not phrase:
            raise ConfigError(f"{where}: expected a phrase with a letter or digit in it, got {text!r}")
    return tuple(phrases)
