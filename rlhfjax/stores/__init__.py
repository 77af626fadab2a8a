"""Object stores: s3:// and gs:// in the place of a directory. A local path passes through here untouched.

A store has no renaming, no locks and no appending. `layout` says what stands in their place there, `lease` who may
write, `workshop` how a directory of this machine and the store are kept in step. The functions here are called where a
run makes something whole; for a path of no store they return at once. All raise Stopped where a store does not answer.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhfjax.errors import ConfigError, RlhfjaxError, Stopped
from rlhfjax.stores.client import BucketStore, Unreachable
from rlhfjax.stores.delivery import delivering
from rlhfjax.stores.layout import STATE
from rlhfjax.stores.lease import Lease
from rlhfjax.stores.sources import fetched as fetched_source
from rlhfjax.stores.urls import directory_of, is_url, url_of
from rlhfjax.stores.workshop import Workshop

__all__ = [
    "Unreachable",
    "address",
    "delivered",
    "fetched",
    "finish",
    "here",
    "is_url",
    "mend",
    "named",
    "need",
    "place_of",
    "publish_step",
    "remove",
    "require_local",
    "send",
    "set_damaged",
    "sharing",
    "state_of",
    "working",
]

_FAREWELL = 15.0  # seconds that a run which ends with an error, or is asked to stop, waits for a store
_open: dict[Path, Workshop] = {}
_urls: dict[Path, str] = {}  # of all that were open in this process


def place_of(path: Path) -> Path:
    """The directory in which a run works: the path itself, or the one that stands for an address."""
    return directory_of(path) if is_url(path) else path


@contextmanager
def working(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Inside, this process alone writes to the run at an address; nothing is done for a local path.

    Raises ConfigError where another launch has it, DataError without bucket or credentials, and Stopped at the end
    where the store did not take the rest, which is kept here.
    """
    if not is_url(path):
        yield
        return
    root = directory_of(path)
    with _or_stopped(path):
        store = BucketStore(url_of(path))
        shop = _opened(root, Workshop(store, root, Lease(store, report)))
    try:
        with _or_stopped(path):
            shop.begin(report)
        yield
    except BaseException:
        _leave(shop, report)
        del _open[root]
        raise
    try:
        with _or_stopped(path):
            shop.close()
    finally:
        del _open[root]


def sharing(path: Path) -> None:
    """Of several processes all but the first: they read what the first fetched, and fetch what they need themselves."""
    if is_url(path):
        root = directory_of(path)
        with _or_stopped(path):
            _opened(root, Workshop(BucketStore(url_of(path)), root))


def here(path: str | Path) -> Path:
    """A directory of this machine with what is at an address, but for the arrays of steps; another path as it is."""
    if not is_url(path):
        return Path(path)
    for root in (directory_of(path), directory_of(path, "read")):
        if _shop_of(root):
            return root
    root = directory_of(path, "read")
    with _or_stopped(path):
        shop = _opened(root, Workshop(BucketStore(url_of(path)), root))
        shop.begin()
    return root


@contextmanager
def delivered(target: Path, force: bool = False) -> Iterator[Path]:
    """Where to make a directory that belongs at `target`, which gets it when the block ends well (`delivery`)."""
    with _or_stopped(target), delivering(target, force) as place:
        if is_url(target):
            _urls[place] = url_of(target)
        yield place


def address(path: Path) -> str:
    """A path for people: an address as it is written."""
    return url_of(path) if is_url(path) else str(path)


def require_local(path: str | Path, what: str) -> None:
    """Raises ConfigError for an address where only a directory of this machine will do."""
    if is_url(path):
        raise ConfigError(f"{what}: expected a directory of this machine, got {url_of(path)}")


def fetched(source: str | Path) -> str | Path:
    """Data files at an address, on a disk of this machine; another source as it is."""
    if not is_url(source):
        return source
    with _or_stopped(Path(source)):
        return fetched_source(source)


def need(folder: Path) -> None:
    """Before a step, or an item of one, is read: fetch what is not here yet."""
    if shop := _shop_of(folder):
        with _or_stopped(folder):
            shop.need(folder)


def mend(folder: Path) -> bool:
    """Where the copy of a step, or of an item, is damaged: fetch it again; whether that was done."""
    shop = _shop_of(folder)
    with _or_stopped(folder):
        return bool(shop and shop.mend(folder))


def publish_step(step_dir: Path) -> None:
    """After a step got its name here."""
    if shop := _shop_of(step_dir):
        with _or_stopped(step_dir):
            shop.publish_step(step_dir)


def remove(path: Path) -> None:
    """Before or after something is deleted here."""
    if shop := _shop_of(path):
        with _or_stopped(path):
            shop.remove(path)


def set_damaged(step_dir: Path) -> None:
    """After a step was set aside."""
    if shop := _shop_of(step_dir):
        with _or_stopped(step_dir):
            shop.set_damaged(step_dir)


def send(folder: Path, deep: bool = True) -> None:
    """What is new in a folder; without `deep` only files in it itself."""
    if shop := _shop_of(folder):
        with _or_stopped(folder):
            shop.send(folder, deep)


def finish(stage_dir: Path) -> None:
    """After a stage got its mark."""
    if shop := _shop_of(stage_dir):
        with _or_stopped(stage_dir):
            shop.finish(stage_dir)


def named(text: str) -> str:
    """A text for people, with addresses in the place of the directories that stand for them."""
    for root, url in _urls.items():
        text = text.replace(str(root), url)
    return text


def state_of(path: Path) -> str:
    """What tells whether processes share the directory that stands for an address: the lock's number, noted in it."""
    try:
        held = json.loads((directory_of(path) / STATE).read_text(encoding="utf-8"))
        return f"what lock {held['number']} of {held['url']} fetched"
    except (OSError, ValueError, KeyError, TypeError):
        return "nothing of this run"


def _opened(root: Path, shop: Workshop) -> Workshop:
    _open[root], _urls[root] = shop, shop.store.url
    return shop


def _shop_of(path: Path) -> Workshop | None:
    return next((shop for root, shop in _open.items() if path == root or root in path.parents), None)


def _leave(shop: Workshop, report: Callable[[str], None]) -> None:
    """The run ends with an error, which is the one to be told."""
    shop.store.patience = _FAREWELL
    try:
        shop.close()
    except (OSError, RlhfjaxError) as error:
        report(f"{shop.store.url} has not all of {shop.root}: {getattr(error, 'strerror', None) or error}")


@contextmanager
def _or_stopped(path: str | Path) -> Iterator[None]:
    """A store that does not answer stops the run, which goes on by the same command: what is whole here stays here."""
    try:
        yield
    except Unreachable as error:
        place = directory_of(path) if is_url(path) else Path(path)
        kept = f"\nwhat it has not yet is kept in {place}" if place.exists() else ""
        raise Stopped(f"{error.strerror}{kept}; run the same command again") from error
