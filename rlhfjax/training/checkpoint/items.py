"""Items of a step: each has a manifest of its own, so that whoever reads one verifies that one.

A step's manifest lists those of its items (`rlhfjax.integrity`). What an item is read for are its arrays, and these are
proven by their digests once they are read, so that before only names, sizes and small files are compared. The files
themselves are hashed when arrays are not what was saved, to name the one that differs.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhfjax.errors import IntegrityError, RlhfjaxError
from rlhfjax.host import exchange, processes
from rlhfjax.integrity import MANIFEST, read_manifest, synced_entries, verifying, write_manifest
from rlhfjax.training.checkpoint.meta import verified_item
from rlhfjax.training.checkpoint.reading import read_tree
from rlhfjax.training.digests import different_leaves

_BUGS = (MemoryError, jax.errors.JaxRuntimeError)  # of this machine, not of what was read
_WRITER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")
Entries = dict[str, dict[str, Any]]


def own_entries(part: Path, shared: bool = False) -> Entries:
    """What manifests say of the files of a step that this process wrote, which are on the disk afterwards.

    Orbax keeps those of each process apart; what is left over is the first one's. Where all write to one folder, the
    files are shared out.
    """
    names = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
    own = names[_index() :: processes.count()] if shared else [name for name in names if _writer(name) == _index()]
    return synced_entries(part, own)


def told_entries(part: Path, shared: bool = False) -> str:
    """`own_entries` as the first process is told them, or why there are none."""
    try:
        return json.dumps(own_entries(part, shared))
    except OSError as error:
        return json.dumps(f"process {_index()}: {error.strerror or error}")


def _index() -> int:
    return jax.process_index() if processes.count() > 1 else 0


def joined(told: Sequence[str]) -> Entries:
    """The entries of all processes. Raises OSError where one could not read or sync its files."""
    found = [json.loads(text) for text in told]
    if failed := [reason for reason in found if isinstance(reason, str)]:
        raise OSError(failed[0])
    return {name: entry for entries in found for name, entry in entries.items()}


def _writer(name: str) -> int:
    found = _WRITER.search(name)
    return int(found[1]) if found else 0


def write_manifests(part: Path, arrays: Mapping[str, Mapping[str, str]], known: Entries) -> None:
    """A manifest for each item, with the digests of its arrays, and then the step's; what is `known` is not read."""
    for folder in sorted(path for path in part.iterdir() if path.is_dir()):
        inside = f"{folder.name}/"
        own = {name.removeprefix(inside): entry for name, entry in known.items() if name.startswith(inside)}
        write_manifest(folder, known=own, arrays=arrays.get(folder.name, {}))
    write_manifest(part, known=known)


def stored_digests(step_dir: Path) -> dict[str, dict[str, str]]:
    """The digests of a step's arrays, by item and path; of a step of format 1 none.

    Raises IntegrityError when a manifest is not what was written.
    """
    manifest = read_manifest(step_dir) or {}
    items = (name.removesuffix(f"/{MANIFEST}") for name in manifest.get("files", ()) if name.endswith(f"/{MANIFEST}"))
    found = {item: (read_manifest(step_dir / item) or {}).get("arrays", {}) for item in items}
    return {item: digests for item, digests in found.items() if digests} or manifest.get("leaves", {})


def item_digests(step_dir: Path, item: str) -> dict[str, str]:
    """`stored_digests` of one item, from its own manifest; none where nothing is compared."""
    if not verifying():
        return {}
    own = read_manifest(step_dir / item)
    return own["arrays"] if own else stored_digests(step_dir).get(item, {})


def read_item(step_dir: Path, item: str, target: Any, unread: str) -> Any:
    """The arrays of an item in the shapes, types and layouts of a tree of shapes; each process reads its own.

    All processes that share the layout ask together, and get them or an error together. A copy of what a store has is
    fetched anew where it is damaged. Raises IntegrityError where the item is not what was written, naming the file, or
    where it is `unread`, and why.
    """
    several = processes.count() > 1 and not all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(target))
    tree, digests, known = None, dict[str, str](), dict[str, str]()

    def read() -> None:
        nonlocal tree, digests, known
        tree = None  # of the first try
        verified_item(step_dir, item)
        digests = item_digests(step_dir, item)
        tree, known = read_tree(step_dir / item, target, digests)

    def prove() -> None:
        if digests and (different := different_leaves(tree, digests, known)):
            raise other_bits(step_dir, item, different)

    for last in (False, True):
        for do in (read, prove):
            mended, error = _together(*_outcome(step_dir, item, do, unread), item, several)
            if error and (last or not mended):
                raise processes.raised_by_all(error) if several else error
            if error:
                break
        else:
            return tree
    raise AssertionError("the second try ends with an array or an error")


def other_bits(step_dir: Path, item: str, different: Sequence[str]) -> IntegrityError:
    """What to say of arrays that were read otherwise than they were saved, if their files are whole."""
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return IntegrityError(
        f"checkpoint {step_dir}: expected {item}/{different[0]} as it was saved, got other bits{more}; its files "
        "are whole, so reading them went wrong: try once more, and then on another machine"
    )


def named(step_dir: Path, item: str, error: Exception) -> tuple[bool, Exception]:
    """What to say of an item that was not read as it was saved: the file that differs, if one does.

    Also whether it was a damaged copy of what a store has, and was fetched anew.
    """
    try:
        return verified_item(step_dir, item, digests=True), error
    except IntegrityError as difference:
        return False, difference


def unreadable(step_dir: Path, what: str, error: Exception) -> Exception:
    """What to raise for an error of tensorstore: IntegrityError in one line, unless it is not about the files."""
    if isinstance(error, (*_BUGS, RlhfjaxError)):
        return error
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return IntegrityError(f"checkpoint {step_dir} {what}: {said[:300]}")


def _outcome(step_dir: Path, item: str, do: Callable[[], None], unread: str) -> tuple[bool, IntegrityError | None]:
    """Whether a file was mended, and what went wrong in this process."""
    try:
        do()
    except Exception as error:  # the files of others are parsed here
        mended, problem = named(step_dir, item, unreadable(step_dir, unread, error))
        if not isinstance(problem, IntegrityError):
            raise problem from error
        return mended, problem
    return False, None


def _together(mended: bool, error: IntegrityError | None, item: str, several: bool) -> tuple[bool, Any]:
    """The outcome of all processes: an error of one is one of all, and mended is what all could mend."""
    if not several:
        return mended, error
    told = [json.loads(text) for text in exchange.tell_all(item, json.dumps([mended, error and str(error)]))]
    failed = [(mended, text) for mended, text in told if text]
    worst = next((text for mended, text in failed if not mended), failed[0][1] if failed else None)
    return all(mended for mended, _ in failed), worst and IntegrityError(worst)
