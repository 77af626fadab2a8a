"""A directory that is made here and delivered to a store: an export, an imported model."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhfjax.errors import ConfigError
from rlhfjax.stores.client import BucketStore, Store, in_parallel
from rlhfjax.stores.layout import MANIFEST
from rlhfjax.stores.urls import directory_of, is_url, url_of

_COMING = ".rlhfjax-delivery"  # there while it is delivered: what lies beside it was left by one that did not end


@contextmanager
def delivering(target: Path, force: bool = False) -> Iterator[Path]:
    """Where to make what belongs at `target`: that itself, or a directory here that is put into the store at the end.

    Raises ConfigError where something is there already, unless it may be replaced (`force`) and has a manifest: files
    that nobody here wrote stay. What counts is the manifest, which is taken away first and written last.
    """
    if not is_url(target):
        yield target
        return
    store, place = BucketStore(url_of(target)), directory_of(target, "made")
    _require_room(store, force)
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield place
        _require_room(store, force)
        store.write(_COMING, b"")
        put_whole(store, place, "")
        store.delete([_COMING])
    finally:
        shutil.rmtree(place, ignore_errors=True)


def put_whole(store: Store, folder: Path, below: str, before_last: Callable[[], None] = lambda: None) -> None:
    """Put a directory with a manifest below a prefix of a store, and nothing else.

    Manifests of folders in it come after all other files, and its own last, after `before_last`, which may raise.
    """
    inside = f"{below}/" if below else ""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    there = store.sizes(below).keys() - {_COMING}
    last = f"{inside}{MANIFEST}"
    store.delete([last] if last in there else [])
    store.delete(there - {f"{inside}{name}" for name in names})
    inner = [name for name in names if name.endswith(f"/{MANIFEST}")]
    for some in ([name for name in names if name != MANIFEST and name not in inner], inner):
        in_parallel(lambda name: store.send(f"{inside}{name}", folder / name), some)
    before_last()
    store.send(last, folder / MANIFEST)


def _require_room(store: Store, force: bool) -> None:
    there = store.sizes()
    if not there or _COMING in there:
        return
    if not force:
        raise ConfigError(f"{store.url}: exists already; choose another address, or --force to replace it")
    if MANIFEST not in there:
        raise ConfigError(f"{store.url}: --force replaces only what rlhfjax wrote there, and it has no {MANIFEST}")
