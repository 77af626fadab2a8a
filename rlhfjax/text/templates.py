"""Chat templates of models: Jinja from a file that somebody else wrote, rendered in a sandbox.

The conventions are those of transformers: blocks are trimmed, `raise_exception`, `strftime_now`, `tojson`, loop
controls and `{% generation %}` are there. A template sees texts, lists and objects only, reaches nothing outside, the
clock included, and its output, calls, ranges and repetitions are bounded. That ends loops without end; a file made to
fill the memory still can.
"""

import copy
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from rlhfjax.errors import ConfigError, DataError

_SOURCE, _OUTPUT = 1 << 20, 1 << 24  # characters
_CALLS, _RANGE, _REPEATED = 1_000_000, 100_000, 1 << 20


class ChatTemplate:
    """A model's own way to write a conversation. Raises ConfigError where it is no Jinja."""

    def __init__(self, source: str):
        self.source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        *,
        tools: Sequence[Any] | None = None,
        date: datetime.date | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text; `strftime_now` writes `date`, and `variables` are what else the template knows.

        Raises DataError when the template refuses the conversation, fails, or computes too much, and ConfigError when
        it writes a date and there is none.
        """
        environment = self._template.environment
        environment.begin(date)  # type: ignore[attr-defined]
        written, parts = 0, []
        known = {"documents": None, **variables, "tools": copy.deepcopy(tools), "messages": copy.deepcopy(messages)}
        try:
            for part in self._template.generate(known, add_generation_prompt=add_generation_prompt):
                written += len(part)
                if written > _OUTPUT:
                    raise jinja2.TemplateError(f"more than {_OUTPUT:,} characters of output")
                parts.append(part)
        except ConfigError:
            raise
        # The template is foreign code: whatever it raises is its own fault, and is told as such.
        except Exception as error:
            reason = str(error).splitlines() or [type(error).__name__]
            roles = [message["role"] for message in messages]
            raise DataError(f"the model's chat template cannot write roles {roles}: {reason[0][:200]}") from error
        return "".join(parts)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that it reads and does not make itself."""
        return frozenset(jinja2.meta.find_undeclared_variables(self._template.environment.parse(self.source)))

    @cached_property
    def _template(self) -> jinja2.Template:
        if len(self.source) > _SOURCE:
            raise ConfigError(f"expected a chat template of at most {_SOURCE:,} characters, got {len(self.source):,}")
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], cache_size=0
        )
        try:
            return environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"expected a chat template in Jinja, got one that does not parse: {error}") from error


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.begin(None)
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": self._now, "range": self._range}

    def begin(self, date: datetime.date | None) -> None:
        """A rendering starts: budgets and the date are its own."""
        self.calls = self.ranged = 0
        self.date = date

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template comes through here, macros included."""
        self.calls += 1
        if self.calls > _CALLS:
            raise jinja2.TemplateError(f"more than {_CALLS:,} calls")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products of texts and powers can outgrow the memory in one step."""
        if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
            raise jinja2.TemplateError("a power that is too large")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if not isinstance(text, int | float) and len(text) * times > _REPEATED:
                    raise jinja2.TemplateError(f"a repetition of more than {_REPEATED:,} items")
        return super().call_binop(context, operator, left, right)

    def _now(self, form: str) -> str:
        if self.date is None:
            raise ConfigError(
                "the model's chat template writes the date, and none is fixed; give one: tokenizer.date: 2026-01-31 in "
                "a configuration, --date 2026-01-31, or load(…, date=…)"
            )
        return in_english(form, self.date)

    def _range(self, *args: int) -> range:
        made = range(*args)
        self.ranged += len(made)
        if self.ranged > _RANGE:
            raise jinja2.TemplateError(f"ranges of more than {_RANGE:,} items")
        return made


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an answer in a template; it writes what is inside."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_WHOLE = {"c": "%a %b %e %H:%M:%S %Y", "x": "%m/%d/%y", "X": "%H:%M:%S"}


def in_english(form: str, date: datetime.date) -> str:
    """`strftime` at the midnight a date begins with, the same whatever language the process is set to."""
    day, month = _DAYS[date.weekday()], _MONTHS[date.month - 1]
    names = {"A": day, "a": day[:3], "B": month, "b": month[:3], "h": month[:3], "p": "AM", "e": f"{date.day:2}"}
    form = re.sub("%(.)", lambda found: _WHOLE.get(found[1], found[0]), form)
    form = re.sub("%(.)", lambda found: names.get(found[1], found[0]), form)
    return datetime.datetime(date.year, date.month, date.day).strftime(form)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
