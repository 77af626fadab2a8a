"""What processes tell each other beside what one of them decides: texts, in the store that they share.

As everything in `processes`, this needs no device, and does nothing among others in a process by itself.
"""

import json
from collections.abc import Callable

import jax

from rlhfjax.errors import RlhfjaxError
from rlhfjax.host import marks, processes


def tell_all(name: str, text: str) -> list[str]:
    """The texts of all processes by their number, once each has come here."""
    if processes.count() == 1:
        return [text]
    store, key = processes.shared_store(), processes.turn_of(name)
    told = collected(key, text)
    if told is None:
        told = json.loads(processes.awaited(f"{key}/all", name))
    else:
        store.key_value_set(f"{key}/all", json.dumps(told))
    marks.met()
    return told


def collected(key: str, text: str) -> list[str] | None:
    """The texts of all processes under a key of `turn_of`, by their number, for the first of them alone.

    Any thread may ask: the turn was taken by the one that all processes run alike.
    """
    if processes.count() == 1:
        return [text]
    store = processes.shared_store()
    store.key_value_set(f"{key}/{jax.process_index()}", text)
    if not processes.is_first():
        return None
    numbers = range(processes.count())
    return [processes.awaited(f"{key}/{number}", "the others' word") for number in numbers]


def by_each(what: Callable[[], object], name: str) -> None:
    """Every process does it. An expected error of one is raised in all, with the number of that process."""
    verdict = ""
    try:
        what()
    except RlhfjaxError as error:
        if processes.count() == 1:
            raise
        verdict = json.dumps([type(error).__name__, f"process {jax.process_index()}: {error}"])
    processes.raise_verdict(next(filter(None, tell_all(name, verdict)), ""))


def post(board: str, text: str) -> None:
    """Leave a text for the others, in the place of what this process left before; nobody waits for it."""
    processes.shared_store().key_value_set(f"rlhfjax/{board}/{jax.process_index()}", text, allow_overwrite=True)


def posted(board: str) -> dict[int, str]:
    """What processes have left until now, by their number."""
    found = processes.shared_store().key_value_dir_get(f"rlhfjax/{board}")
    return {int(key.rpartition("/")[2]): text for key, text in found}
