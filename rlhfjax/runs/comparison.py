"""Two runs of one configuration, compared stage by stage and step by step: the first difference of each stage."""

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlhfjax.training.checkpoint import stored_digests

_TIMES = ("timing/", "perf/")  # what depends on the machine's day
_FREE = {"date", "stage_seconds"}  # of evaluation.json
_SHOWN = 3


def first_differences(one: Path, other: Path, stages: list[str]) -> list[str]:
    """One line for each stage that differs: at which step, and in what; `one` holds what was expected."""
    lines = []
    for stage in stages:
        difference = next(_differences(one / stage, other / stage), None)
        lines += [f"{stage} {difference}"] if difference else []
    return lines


def _differences(one: Path, other: Path) -> Iterator[str]:
    digest = "tokenizer.model.sha256" if (one / "tokenizer.model.sha256").exists() else "tokenizer.sha256"
    if _text(one / digest) != _text(other / digest):
        yield f"{digest}: expected {_text(one / digest)!r}, got {_text(other / digest)!r}"
    if (one / "ledger.jsonl").exists():  # an older version kept none
        yield from _rows(one / "ledger.jsonl", other / "ledger.jsonl", "ledger ")
    yield from _rows(one / "metrics.jsonl", other / "metrics.jsonl", "")
    yield from _rows(one / "samples.jsonl", other / "samples.jsonl", "sample ")
    yield from _leaves(one / "checkpoints", other / "checkpoints")
    if (one / "evaluation.json").exists():
        old, new = (_evaluation(place / "evaluation.json") for place in (one, other))
        changed = [key for key in old.keys() | new.keys() if _dumped(old.get(key)) != _dumped(new.get(key))]
        if changed:
            yield f"evaluation.json: {', '.join(sorted(changed))}"


def _rows(one: Path, other: Path, what: str) -> Iterator[str]:
    """Rows that differ, their texts compared: a number is equal when all its digits are."""
    for old, new in zip_longest(_without_times(one), _without_times(other)):
        if old == new:
            continue
        if old is None or new is None or old.get("step") != new.get("step"):
            steps = [json.dumps(row.get("step")) if row else "nothing" for row in (old, new)]
            yield f"{what}step: expected {steps[0]}, got {steps[1]}"
            continue
        names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
        if what:  # texts are private
            yield f"{what}step {old['step']}: {', '.join(names)}"
            continue
        shown = "; ".join(f"{name} expected {old.get(name)}, got {new.get(name)}" for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"{what}step {old['step']}: {shown}{more}"


def _without_times(path: Path) -> Iterator[dict[str, str]]:
    """Each row as the texts of its values; a line that is no row as itself."""
    for line in _text(path).split("\n"):
        if not line:
            continue
        try:
            row = json.loads(line, parse_float=str, parse_int=int, parse_constant=str)
            yield {name: value for name, value in row.items() if not name.startswith(_TIMES)}
        except (ValueError, AttributeError):
            yield {"step": "unreadable", "line": line}


def _leaves(one: Path, other: Path) -> Iterator[str]:
    """The steps that both keep; the last one of either must be in the other."""
    steps = [{int(path.name) for path in place.glob("*") if path.name.isdigit()} for place in (one, other)]
    if not any(steps):
        return
    last = [max(kept, default=None) for kept in steps]
    if last[0] != last[1]:
        yield f"checkpoints: expected {last[0]} as the last step, got {last[1]}"
    for step in sorted(steps[0] & steps[1]):
        old, new = (_flat(stored_digests(place / str(step))) for place in (one, other))
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed or not old:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            yield f"checkpoint {step}: {', '.join(changed[:_SHOWN]) or 'it has no digests'}{more}"


def _flat(leaves: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{item}/{name}": digest for item, found in leaves.items() for name, digest in found.items()}


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        return {key: value for key, value in json.loads(_text(path)).items() if key not in _FREE}
    except ValueError:
        return {}


def _dumped(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
