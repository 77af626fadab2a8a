"""Chat templates of models: Jinja from a file that somebody else wrote, rendered in a sandbox.

The conventions are those of transformers: blocks are trimmed, `raise_exception`, `strftime_now`, `tojson`, loop
controls and `{% generation %}` are there. A template sees text and lists only, reaches nothing outside, and its output,
calls, ranges and repetitions are bounded. That ends loops without end; a file made to fill the memory still can.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from rlhfjax.errors import ConfigError

_SOURCE, _OUTPUT = 1 << 20, 1 << 24  # characters
_CALLS, _RANGE, _REPEATED = 1_000_000, 100_000, 1 << 20


class ChatTemplate:
    """A model's own way to write a conversation. Raises ConfigError where it is no Jinja."""

    def __init__(self, source: str):
        self.source = source

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, **tokens: str | None) -> str:
        """The conversation as text. Raises ConfigError when the template refuses it, fails, or computes too much."""
        environment = self._template.environment
        environment.calls = environment.ranged = 0  # type: ignore[attr-defined]  # the budget is that of one rendering
        written, parts = 0, []
        copies = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            for part in self._template.generate(
                messages=copies, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **tokens
            ):
                written += len(part)
                if written > _OUTPUT:
                    raise jinja2.TemplateError(f"more than {_OUTPUT:,} characters of output")
                parts.append(part)
        # The template is foreign code: whatever it raises is its own fault, and is told as such.
        except Exception as error:
            reason = str(error).splitlines() or [type(error).__name__]
            roles = [message["role"] for message in messages]
            raise ConfigError(f"the model's chat template cannot write roles {roles}: {reason[0][:200]}") from error
        return "".join(parts)

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
        self.calls = self.ranged = 0
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "range": self._range}

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


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
