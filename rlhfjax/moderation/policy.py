"""`policy.yaml`: who judges, and what becomes of each category on either side."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, WrapValidator

from rlhfjax.config.sections import Count, Fraction, Positive, Section
from rlhfjax.errors import ConfigError
from rlhfjax.moderation.audit import Audit
from rlhfjax.moderation.moderator import Moderator, Treatment
from rlhfjax.moderation.reading import ByCategory, read_section
from rlhfjax.moderation.remote import Remote
from rlhfjax.moderation.rule_files import SHIPPED as SHIPPED_RULES
from rlhfjax.moderation.rule_files import read_rules
from rlhfjax.moderation.rules import Rules
from rlhfjax.moderation.verdicts import CATEGORIES, Action, Backend
from rlhfjax.places import expanded

Text = Annotated[str, Field(min_length=1)]
DEFAULT = Path(__file__).with_name("policy.yaml")


class RulesBackend(Section):
    """Patterns: those that are shipped, and those in `files`."""

    kind: ClassVar[str] = "rules"

    files: list[Text] = []
    shipped: bool = True

    def open(self) -> Backend:
        """The back end. Raises ConfigError where a file cannot be read."""
        paths = [SHIPPED_RULES] * self.shipped + [expanded(name) for name in self.files]
        return Rules([pattern for path in paths for pattern in read_rules(path)])


class UrlBackend(Section):
    """A service with OpenAI's `/v1/moderations`, such as `https://api.openai.com/v1`.

    `key_env` names the variable of the environment that holds its key. It answers within `timeout` seconds; an answer
    under way is judged by windows of `window` characters, each `every` new ones.
    """

    kind: ClassVar[str] = "url"

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+[^\s?#@]*$")]
    model: Text | None = None
    key_env: Text | None = None
    timeout: Positive = 10.0
    window: Count = 400
    every: Count = 200

    def open(self) -> Backend:
        """The back end; nothing is asked yet. Raises ConfigError where its key is not there."""
        key = os.environ.get(self.key_env, "").strip() if self.key_env else None
        if self.key_env and not key:
            raise ConfigError(
                f"{self.url}: expected its key in the variable {self.key_env} of the environment, got none"
            )
        return Remote(self.url, self.model, key, self.timeout, self.window, self.every)


BackendSection = RulesBackend | UrlBackend
KINDS: dict[str, type[RulesBackend | UrlBackend]] = {kind.kind: kind for kind in get_args(BackendSection)}


def _by_kind(given: Any, _: Any) -> Any:
    """The entry as what its one key says, so that an error is about that kind and not about all of them."""
    if isinstance(given, Section):
        return given
    keys = [str(key) for key in given] if isinstance(given, dict) else []
    if len(keys) == 1 and keys[0] in KINDS:
        inner = given[keys[0]]
        return KINDS[keys[0]].model_validate({} if inner is None else inner)
    near = difflib.get_close_matches(keys[0], KINDS, n=1) if len(keys) == 1 else []
    hint = f"; did you mean {near[0]}?" if near else ""
    got = " and ".join(keys) or ("no key" if isinstance(given, dict) else "a value without keys")
    raise ValueError(f"expected a section with one of {', '.join(KINDS)}, got {got}{hint}")


class CategoryPolicy(Section):
    """What becomes of a category: `action`, or one of its own for `input` and `output`; the rest is as for all.

    From the score `threshold` on it is flagged. `filler` is said in place of such a text, or as the answer to it.
    """

    action: Action | None = None
    input: Action | None = None
    output: Action | None = None
    threshold: Fraction | None = None
    filler: Text | None = None


class Policy(Section):
    """A policy. `action`, `threshold` and `filler` are those of each category that has none of its own.

    A filler may name the `{category}`. `unavailable` is said where a back end fails and `on_error` is closed. To the
    file `audit` a line is added for each text that is flagged.
    """

    description: str = ""
    backends: Annotated[list[Annotated[BackendSection, WrapValidator(_by_kind)]], Field(min_length=1)]
    combine: Literal["any", "all", "first"] = "any"
    on_error: Literal["closed", "open"] = "closed"
    action: Action = "replace"
    threshold: Fraction = 0.5
    filler: Text = "I would rather not talk about that. Is there something else that I can help with?"
    unavailable: Text = "I cannot answer that at the moment. Please try again later."
    categories: ByCategory[CategoryPolicy] = {}
    audit: Text | None = None

    def treatments(self) -> dict[str, Treatment]:
        """What becomes of each category."""
        return {name: self._treatment(name, self.categories.get(name, CategoryPolicy())) for name in CATEGORIES}

    def _treatment(self, name: str, own: CategoryPolicy) -> Treatment:
        action = own.action or self.action
        threshold = self.threshold if own.threshold is None else own.threshold
        filler = (own.filler or self.filler).replace("{category}", name)
        return Treatment(own.input or action, own.output or action, threshold, filler)


def read_policy(path: str | Path) -> Policy:
    """The policy of a file; `default` is the one that is shipped. Raises ConfigError with each problem and its line."""
    file = DEFAULT if str(path) == "default" else expanded(path)
    return read_section(file, Policy, "a moderation policy (backends, categories)")[0]


def policy_files(path: str | Path) -> list[str]:
    """The files that a policy is made of, its own and those of its rules, none that is shipped. Raises ConfigError."""
    backends = read_policy(path).backends
    rules = [name for backend in backends if isinstance(backend, RulesBackend) for name in backend.files]
    return ([] if str(path) == "default" else [str(path)]) + rules


def open_policy(path: str | Path, audited: bool = True) -> Moderator:
    """A policy's file (or `default`) at work; without `audited` its audit log stays as it is. Raises ConfigError."""
    policy = read_policy(path)
    audit = [Audit(expanded(policy.audit))] if policy.audit and audited else []
    return Moderator(
        [backend.open() for backend in policy.backends],
        policy.treatments(),
        policy.combine,
        policy.on_error,
        policy.unavailable,
        *audit,
    )
