"""The kinds of records, the fields that make them up, and how somebody says in which form files hold them.

Names alone, so that a configuration is checked without what reads files, which is `rlhfjax.data`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from rlhfjax.errors import ConfigError

FIELDS: Mapping[str, frozenset[str]] = {  # what makes up a record of each kind; beside it there are ids and settings
    "document": frozenset({"text"}),
    "demonstration": frozenset({"prompt", "completion", "messages"}),
    "comparison": frozenset({"prompt", "messages", "responses", "ranks", "chosen", "rejected"}),
    "prompt": frozenset({"prompt", "messages"}),
    "unpaired": frozenset({"prompt", "messages", "completion", "label"}),
    "rating": frozenset({"output_id", "labeler_id", "likert", "flags"}),
}
SETTINGS = frozenset({"tools", "chat_template_kwargs"})  # beside a prompt of any kind
MAY_MISS = frozenset({"prompt_id", "labeler_id", "use_case", "system"}) | SETTINGS  # in rows that a map is for
_NEEDS = (  # what says which kind a map means, the richest first
    ("comparison", {"chosen", "rejected"}),
    ("comparison", {"responses", "ranks"}),
    ("unpaired", {"completion", "label"}),
    ("demonstration", {"completion"}),
    ("demonstration", {"messages"}),
    ("prompt", {"prompt"}),
    ("rating", {"output_id", "likert"}),
    ("document", {"text"}),
)
SAMPLE_BY = ("paragraph", "line", "document")
LAYOUTS = (  # as rlhfjax.data.layouts tries them
    *("rlhfjax", "ultrafeedback", "summarize_from_feedback", "safe_rlhf", "safe_rlhf_safer"),
    *("argilla", "label_studio", "label_studio_chat", "oasst", "oasst_best", "oasst_messages", "oasst_messages_best"),
    *("hh", "alpaca_kto", "alpaca_preference", "alpaca", "dolly", "self_instruct"),
    *("question_preference", "multiple_choice", "question_answer", "mt_bench", "vicuna"),
    *("trl_unpaired", "trl_preference", "trl_implicit_preference", "prompt_inside", "implicit_preference"),
    *("trl_prompt_completion", "verl", "trl_prompt", "openai_preference"),
    *("sharegpt_kto", "sharegpt_preference", "sharegpt"),
    *("openai_chat_kto", "openai_chat_preference", "openai_chat"),
    *("conversation_kto", "conversation_preference", "conversation"),
)
_NEAREST = 3


@dataclass(frozen=True)
class Reading:
    """How files shall be read: a layout by its name, or our fields from theirs; neither recognises the layout.

    `sample_by` says what a document of a plain text is: paragraph, line or document (the file). Raises ConfigError for
    both of layout and map, and for what there is not.
    """

    layout: str | None = None
    map: tuple[tuple[str, str], ...] = ()
    sample_by: str = "paragraph"

    def __post_init__(self) -> None:
        if self.layout and self.map:
            raise ConfigError("expected either a layout or a map of fields, got both; keep the one that is meant")
        if self.sample_by not in SAMPLE_BY:
            raise ConfigError(f"sample_by: expected one of {', '.join(SAMPLE_BY)}, got {self.sample_by!r}")
        if self.map:
            kind_of_map(dict(self.map))
        if self.layout:
            require_layout(self.layout)


def reading_of(layout: str | None, mapping: Mapping[str, str], sample_by: str = "paragraph") -> Reading:
    """The same from plain values."""
    return Reading(layout, tuple(sorted(mapping.items())), sample_by)


def require_layout(name: str) -> None:
    """Raises ConfigError, naming the nearest layouts, where there is none of that name."""
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, _NEAREST) or LAYOUTS
        raise ConfigError(f"expected a layout such as {', '.join(near)}, got {name!r}")


def kind_of_map(mapping: Mapping[str, str]) -> str:
    """The record kind of which a map (our field to theirs) gives the fields.

    Raises ConfigError for a name that no record has, and where the names make up no record.
    """
    known = sorted(frozenset().union(*FIELDS.values()) | MAY_MISS)
    for name in mapping:
        if name not in known:
            ours = ", ".join(known)
            raise ConfigError(f"--map {name}={mapping[name]}: expected a field of ours ({ours}), got {name!r}")
    kinds = [kind for kind, needs in _NEEDS if needs <= set(mapping)]
    if not kinds:
        raise ConfigError(
            f"--map: expected the fields of a record kind (such as prompt and completion), got {', '.join(mapping)}"
        )
    return kinds[0]
