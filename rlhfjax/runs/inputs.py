"""Inputs of a run as they are now: records of every source, given checkpoints and tokenizer, the mesh, the target."""

from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.recipe import TOKENIZER
from rlhfjax.data.datasets import default_data_dir
from rlhfjax.data.recount import changed_since_preparation
from rlhfjax.data.sources import fingerprint_of, open_either
from rlhfjax.errors import RlhfjaxError
from rlhfjax.runs.checks import entries, given, mesh_of, meshes_now
from rlhfjax.runs.sizes import first_target
from rlhfjax.runs.sources import rewards_of


def inputs_now(run: Run) -> tuple[dict[str, Any], list[str]]:
    """Facts as an attempt notes them, and a line for each input that cannot be read or was damaged."""
    problems: list[str] = []
    data = _data(run, problems)
    facts: dict[str, Any] = {"data": data}
    for name, find in (
        ("rewards", lambda: rewards_of(run)),
        ("started_from", lambda: given(run)),
        ("mesh", lambda: meshes_now(run)),
        ("target", lambda: first_target(run, mesh_of(run, TOKENIZER)).facts()),
    ):
        try:
            facts |= find() if name == "mesh" else {name: find()}
        except RlhfjaxError as error:
            problems.append(str(error))
    return facts, problems


def _data(run: Run, problems: list[str]) -> dict[str, str]:
    data_dir = Path(run.data_dir) if run.data_dir else default_data_dir()
    found: dict[str, str] = {}
    for entry, kind in entries(run):
        name = entry.name
        if name in found:
            continue
        try:
            found[name] = fingerprint_of(entry.source, entry.split, data_dir, kind, entry.reading)
            folder = open_either(entry.source, entry.split, data_dir, kind, entry.reading).folder
            problems += [f"data {name}: {line}" for line in changed_since_preparation(folder, entry.split)]
        except RlhfjaxError as error:
            problems.append(f"data {name}: {error}")
    return found
