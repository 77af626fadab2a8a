"""Record kinds as TFDS features: the way there and back.

Fields that a record may leave out are stored empty and left out again on reading; no record may hold them empty.
A dataset that was prepared before there was a field is read as one whose records leave it out.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.plain_json import dumps

_OPTIONAL = frozenset(
    {
        "prompt",
        "completion",
        "messages",
        "tools",
        "chat_template_kwargs",
        "prompt_id",
        "labeler_id",
        "use_case",
        "extra",
    }
)


class _Form(NamedTuple):
    feature: Callable[[Any], Any]  # of TFDS's features
    empty: Any
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def _as_is(value: Any) -> Any:
    return value


def _json(value: Any) -> str:
    return dumps(value)


def _encode_messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Role and content as text, and what few messages have, such as calls of tools, as JSON beside them."""
    encoded = []
    for message in messages:
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        encoded.append({"role": message["role"], "content": message["content"], "more": _json(more) if more else ""})
    return encoded


def _decode_messages(columns: dict[str, Any]) -> list[dict[str, Any]]:
    more = columns.get("more", [b""] * len(columns["role"]))
    return [
        {"role": role.decode(), "content": content.decode(), **(json.loads(rest) if rest else {})}
        for role, content, rest in zip(columns["role"], columns["content"], more, strict=True)
    ]


def _vector(dtype: Any) -> Callable[[Any], Any]:
    return lambda kinds: kinds.Tensor(shape=(None,), dtype=dtype)


def _scalar(dtype: Any) -> Callable[[Any], Any]:
    return lambda kinds: kinds.Scalar(dtype=dtype)


_FORMS = {
    "text": _Form(lambda kinds: kinds.Text(), "", _as_is, lambda raw: raw.decode()),
    "texts": _Form(lambda kinds: kinds.Sequence(kinds.Text()), [], _as_is, lambda raw: [text.decode() for text in raw]),
    "messages": _Form(
        lambda kinds: kinds.Sequence({name: kinds.Text() for name in ("role", "content", "more")}),
        [],
        _encode_messages,
        _decode_messages,
    ),
    "json": _Form(
        lambda kinds: kinds.Text(),
        {},
        _json,
        lambda raw: json.loads(raw.decode()),
    ),
    "bool": _Form(_scalar(np.bool_), False, _as_is, bool),
    "int": _Form(_scalar(np.int64), 0, _as_is, int),
    "float": _Form(_scalar(np.float32), 0.0, _as_is, float),
    "ints": _Form(_vector(np.int64), [], lambda value: np.asarray(value, np.int64), lambda raw: raw.tolist()),
    "bools": _Form(_vector(np.bool_), [], lambda value: np.asarray(value, np.bool_), lambda raw: raw.tolist()),
}

_ASKED = {
    "prompt": "text",
    "messages": "messages",
    "tools": "json",
    "chat_template_kwargs": "json",
    "prompt_id": "text",
    "extra": "json",
}
_TABLE: dict[str, dict[str, str]] = {
    "document": {"text": "text", "extra": "json"},
    "demonstration": {**_ASKED, "completion": "text"},
    "comparison": {**_ASKED, "responses": "texts", "ranks": "ints", "labeler_id": "text"},
    "prompt": {**_ASKED, "use_case": "text"},
    "unpaired": {**_ASKED, "completion": "text", "label": "bool", "labeler_id": "text"},
    "rating": {"output_id": "text", "labeler_id": "text", "likert": "int", "flags": "json", "extra": "json"},
    # One text with every rater's number: what judges and human agreement are computed from. Never read from JSONL.
    "rated_text": {
        "text": "text",
        "text_id": "text",
        "batch": "int",
        "mean_train": "float",
        "ratings": "ints",
        "heldout": "bools",
        "dropped": "bools",
    },
}


def features(kind: str) -> Any:
    """The TFDS features of one record kind, a FeaturesDict."""
    import tensorflow_datasets as tfds  # who reads rows of tokens does without it

    return tfds.features.FeaturesDict(
        {name: _FORMS[form].feature(tfds.features) for name, form in _TABLE[kind].items()}
    )


def encode(kind: str, record: dict[str, Any]) -> dict[str, Any]:
    """A canonical record as a TFDS example; absent optional fields become empty ones."""
    return {
        name: _FORMS[form].encode(record.get(name, _FORMS[form].empty) if name in _OPTIONAL else record[name])
        for name, form in _TABLE[kind].items()
    }


def decode(kind: str, example: dict[str, Any]) -> dict[str, Any]:
    """A TFDS example as the canonical record it was made from."""
    record = {name: _FORMS[form].decode(example[name]) for name, form in _TABLE[kind].items() if name in example}
    return {name: value for name, value in record.items() if value or name not in _OPTIONAL}
