"""Data files in a store: fetched once to a disk of this machine, where they are read as any others."""

import fcntl
import fnmatch
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from rlhfjax.errors import DataError
from rlhfjax.stores.client import BucketStore, in_parallel
from rlhfjax.stores.urls import directory_of, split

_WILD = re.compile(r"[*?\[]")
_STAMPS = ".stamps"
_fetched: dict[str, Path] = {}


def fetched(source: str | Path) -> Path:
    """The copy of a file, of a folder, or of what a pattern matches, as a path or pattern of this machine.

    What has not changed in the store since it was fetched (its size and the store's own digest of it) is not fetched
    again. Of several processes of this machine one fetches. Raises DataError where nothing is there.
    """
    text = str(source)
    if text not in _fetched:
        scheme, bucket, key = split(text)
        wild = _WILD.search(key)
        folder = key[: wild.start()].rpartition("/")[0] if wild else key
        _fetch(BucketStore(f"{scheme}://{bucket}"), folder, key if wild else None, text)
        _fetched[text] = directory_of(f"{scheme}://{bucket}/{key}", "data")
    return _fetched[text]


def _fetch(store: BucketStore, folder: str, pattern: str | None, named: str) -> None:
    wanted = store.stamps(folder)
    if pattern:
        wanted = {key: stamp for key, stamp in wanted.items() if fnmatch.fnmatchcase(key, pattern)}
    if not wanted:
        raise DataError(f"{named}: expected a file or folder with data files, got nothing there; correct the address")
    root = directory_of(store.url, "data")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = _held(root)
        in_parallel(
            lambda key: store.fetch(key, root / key),
            [key for key in wanted if held.get(key) != wanted[key] or not (root / key).is_file()],
        )
        for path in [path for path in (root / folder).rglob("*") if path.is_file()] if not pattern else []:
            if path.relative_to(root).as_posix() not in wanted:
                path.unlink()
        part = root / f"{_STAMPS}.part"
        part.write_text(json.dumps(held | wanted), encoding="utf-8")
        os.replace(part, root / _STAMPS)


def _held(root: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return dict(json.loads((root / _STAMPS).read_text(encoding="utf-8")))
    return {}
