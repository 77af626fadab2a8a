"""The schemas of records in JSONL files, and a reader that says for every wrong line what is wrong with it.

One object a line, UTF-8. Fields that a schema does not know are kept under `extra`. Messages of errors name places,
fields and types, never the content: prompts and labels are private.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhfjax.data.fields import Fields, check_values, type_name
from rlhfjax.data.messages import conversation, prompt, settings
from rlhfjax.errors import ConfigError, DataError

MAX_LINE_BYTES = 16 << 20
_MAX_RANK = 2**31 - 1
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Record = dict[str, Any]


def parse_record(kind: str, obj: Any, where: str) -> Record:
    """One decoded JSON object as the canonical record of its kind; `where` (file:line) begins every error.

    Canonical: `messages` where the object has them, else `prompt`; a comparison always has `responses` and `ranks`
    (1 best, equal = tie); all unknown fields are under `extra`, and a field that is absent stays absent.

    Raises DataError where a field is missing, of the wrong type or out of range; ConfigError for an unknown kind.
    """
    check_kind(kind)
    if not isinstance(obj, dict):
        raise DataError(f"{where}: expected an object with the fields of a {kind}, got {type_name(obj)}")
    check_values(obj, where)
    fields = Fields(kind, obj, where)
    record = _PARSERS[kind](fields)
    return {**record, **fields.rest()}


def check_kind(kind: str) -> None:
    """Raises ConfigError, naming the nearest kind, unless `kind` is one of KINDS."""
    if kind not in _PARSERS:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"expected a record kind among {', '.join(KINDS)}, got {kind!r}{hint}")


def read_jsonl(path: str | Path, kind: str) -> Iterator[Record]:
    """The canonical records of a JSONL file, one at a time: a file of any size takes the memory of one line.

    A byte-order mark, CR LF and blank lines are accepted.

    Raises DataError with file:line for a line that is no record, for a line over 16 MiB, and for a missing or empty
    file.
    """
    path = Path(path)
    count = 0
    try:
        with path.open("rb") as file:
            for where, line in _lines(file, path):
                count += 1
                yield parse_record(kind, _decode_line(line, where), where)
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable JSONL file, got {error.strerror or error}; check the path"
        ) from None
    if not count:
        raise DataError(f"{path}: expected at least one {kind}, got an empty file")


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{where}: expected lines of at most {MAX_LINE_BYTES >> 20} MiB, got a longer one; "
                "write one object a line, and split long documents"
            )
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield where, line


def _decode_line(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        raise DataError(f"{where}: expected UTF-8 text, got {got}; save the file as UTF-8") from None
    try:
        return json.loads(text.rstrip(), parse_constant=_reject_constant)
    except RecursionError:
        raise DataError(f"{where}: expected an object with a few levels, got one nested too deep to read") from None
    except ValueError as error:
        got = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        remedy = (
            "write one JSON object a line" if line.endswith(b"\n") else "if the last line is cut off, write it again"
        )
        raise DataError(f"{where}: expected JSON, got {got}; {remedy}") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no JSON number")


def _document(fields: Fields) -> Record:
    return {"text": fields.text("text")}


def _demonstration(fields: Fields) -> Record:
    if fields.left.get("label") is False:
        raise fields.error("label", "a good answer to learn from", "false", "read the file as unpaired records")
    fields.not_both("messages", "prompt")
    fields.not_both("messages", "completion")
    if "messages" in fields:
        return {**conversation(fields, "assistant"), **fields.ids("prompt_id")}
    texts = {"prompt": fields.text("prompt"), "completion": fields.text("completion")}
    return {**texts, **settings(fields), **fields.ids("prompt_id")}


def _unpaired(fields: Fields) -> Record:
    """An answer with a label, true where people found it good (Ethayarajh et al. 2024, KTO)."""
    asked = prompt(fields)
    answer = {"completion": fields.text("completion"), "label": fields.take("label", bool, "true or false")}
    return {**asked, **answer, **fields.ids("labeler_id", "prompt_id")}


def _comparison(fields: Fields) -> Record:
    asked = prompt(fields)
    fields.not_both("responses", "chosen")
    if "chosen" in fields or "rejected" in fields:
        pair = [fields.take(name, str, "a string") for name in ("chosen", "rejected")]
        responses, ranks = pair, [1, 2]
    else:
        responses, ranks = _ranked_responses(fields)
    if not any(response.strip() for response in responses):
        raise fields.error("responses", "at least one response with text in it", "only empty ones", "drop the record")
    return {**asked, "responses": responses, "ranks": ranks, **fields.ids("labeler_id", "prompt_id")}


def _ranked_responses(fields: Fields) -> tuple[list[str], list[int]]:
    responses = fields.take("responses", list, "a list of strings")
    ranks = fields.take("ranks", list, "a list of whole numbers")
    for index, response in enumerate(responses):
        if not isinstance(response, str):
            raise fields.error(f"responses[{index}]", "a string", type_name(response))
    for index, rank in enumerate(ranks):
        if type(rank) is not int:
            raise fields.error(f"ranks[{index}]", "a whole number", type_name(rank))
        if not 1 <= rank <= _MAX_RANK:
            raise fields.error(f"ranks[{index}]", "a rank from 1 (best) on", "one out of range", "number them from 1")
    if len(responses) < 2:
        raise fields.error("responses", "at least 2 responses to compare", str(len(responses)))
    if len(ranks) != len(responses):
        raise fields.error("ranks", f"one rank for each of {len(responses)} responses", f"{len(ranks)} ranks")
    return responses, ranks


def _prompt(fields: Fields) -> Record:
    return {**prompt(fields), **fields.ids("prompt_id"), **fields.optional("use_case")}


def _rating(fields: Fields) -> Record:
    ids = {name: fields.identity(name) for name in ("output_id", "labeler_id")}
    likert = fields.take("likert", int, "a whole number from 1 to 7")
    if not 1 <= likert <= 7:
        raise fields.error("likert", "a whole number from 1 to 7", "one out of range")
    return {**ids, "likert": likert, "flags": fields.take("flags", dict, "an object")}


_PARSERS: dict[str, Callable[[Fields], Record]] = {
    "document": _document,
    "demonstration": _demonstration,
    "comparison": _comparison,
    "prompt": _prompt,
    "unpaired": _unpaired,
    "rating": _rating,
}
KINDS = tuple(_PARSERS)
