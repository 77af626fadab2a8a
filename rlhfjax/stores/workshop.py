"""The directory in which a run of an object store works, and what of it is in the store.

A run works on a disk of this machine, with the calls and the promises of any local run. What is whole there is put into
the store, in an order that leaves the store whole whenever this process ends: rows before the step that they belong to,
the files of a step before its manifest, everything of a stage before its mark. The store alone counts: a launch on
another machine begins with what is there, and one on this machine goes on with what it has if nobody else had the lock
since.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhfjax.errors import ConfigError
from rlhfjax.stores.client import Store, in_parallel
from rlhfjax.stores.delivery import put_whole
from rlhfjax.stores.growing import Growing
from rlhfjax.stores.layout import COMPLETE, DAMAGED, MANIFEST, STATE, Contents, grows, local_files, local_steps
from rlhfjax.stores.lease import Lease

_LARGEST = 4e9  # bytes of all that is no step: metrics and samples of long runs are some hundred megabytes
_SMALL = 16_384  # bytes of files that are fetched of every step at once: its meta among them


class Workshop:
    """A directory that stands for a prefix of a store; without a lease it is only read."""

    def __init__(self, store: Store, root: Path, lease: Lease | None = None):
        self.store, self.root, self._lease = store, root, lease
        self._sent: dict[str, tuple[int, int, int]] = {}  # what files were when they were sent
        self._growing: dict[str, Growing] = {}
        self._complete: set[Path] = set()  # steps and items of which this process has all files
        self._turn = threading.RLock()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def key(self, path: Path) -> str:
        """The key of a path below the root."""
        return path.relative_to(self.root).as_posix()

    def begin(self, report: Callable[[str], None] = lambda text: None) -> None:
        """Make directory and store agree. What a killed launch left half done is removed from both."""
        contents = Contents.of(self.store.sizes())
        if self._lease is None:
            self._pull(contents)
            return
        self._require_run(contents)
        whole = contents.whole()
        for step, held in contents.steps.items():
            if MANIFEST not in held and DAMAGED not in held:
                self.store.delete(f"{step}/{name}" for name in held)
                if not (self.root / step / MANIFEST).exists():
                    report(f"{self.store.url}/{step}: was not finished when the process that saved it ended; removed")
        if self._number() == self._lease.before > 0:
            self._catch_up(contents, whole)
        else:
            self._pull(contents)
        for key, found in contents.parts.items():  # of a stage that was marked, and killed before they became one
            if self._finished(self.root / key):
                if key in self._growing:
                    self._growing.pop(key).finish(self.root / key)
                self.store.delete(found.values())
        (self.root / STATE).write_text(json.dumps({"url": self.store.url, "number": self._lease.number}))

    def _require_run(self, contents: Contents) -> None:
        """Raises ConfigError before a bucket full of other things is fetched, or steps that cannot be told whole."""
        size = sum(contents.files.values())
        if size > _LARGEST:
            raise ConfigError(
                f"{self.store.url}: expected a new address or that of a run, got {len(contents.files):,} other objects "
                f"of {size / 1e9:,.0f} GB; give another --run-dir"
            )
        for step, held in contents.steps.items():
            if MANIFEST not in held and "meta/metadata" in held and _older(self.store.read(f"{step}/meta/metadata")):
                raise ConfigError(
                    f"{self.store.url}/{step}: an older version wrote it, without a {MANIFEST}, which says that a step "
                    "of a store is whole; go on with a copy of the run on a disk"
                )

    def publish_step(self, step_dir: Path) -> None:
        """Put a step that is whole into the store; it counts there once its manifest is written, which is last."""
        with self._turn:
            self._require()
            self.send(self.root, deep=False)
            self.send(step_dir.parent.parent)
            put_whole(self.store, step_dir, self.key(step_dir), self._require)
            self._complete.add(step_dir)

    def send(self, folder: Path, deep: bool = True) -> None:
        """Files below a folder that the store has not as they are; marks of stages come by `finish` alone."""
        with self._turn:
            self._require()
            for key, path in local_files(self.root, folder):
                if path.name == COMPLETE or not (deep or path.parent == folder):
                    continue
                if grows(key) and not self._finished(path):
                    self._growing.setdefault(key, Growing(self.store, key)).send(path)
                else:
                    self._send(key, path)

    def finish(self, stage_dir: Path) -> None:
        """The mark of a stage, after all else of it; then its growing files become whole objects."""
        with self._turn:
            self._require()
            self._send(self.key(stage_dir / COMPLETE), stage_dir / COMPLETE)
            for key, path in local_files(self.root, stage_dir):
                if grows(key) and key in self._growing:
                    self._growing.pop(key).finish(path)

    def remove(self, path: Path) -> None:
        """Delete what the store has under a path: marks first, then manifests, so that nothing torn ever counts."""
        with self._turn:
            self._require()
            key = self.key(path)
            there = self.store.sizes(key)
            self.store.delete(sorted(each for each in there if each.endswith(f"/{COMPLETE}")))
            self.store.delete(
                sorted(f"{step}/{MANIFEST}" for step, held in Contents.of(there).steps.items() if MANIFEST in held)
            )
            self.store.delete(sorted(each for each in there if each.endswith(f"/{MANIFEST}")))
            self.store.delete(sorted(there))
            below = (key, f"{key}/")
            self._sent = {each: was for each, was in self._sent.items() if not each.startswith(below)}
            self._growing = {each: grown for each, grown in self._growing.items() if not each.startswith(below)}
            self._complete = {step for step in self._complete if not step.is_relative_to(path)}

    def set_damaged(self, step_dir: Path) -> None:
        """Mark a step that was found damaged: it does not count any more, and can be looked at."""
        self._require()
        self.store.write(f"{self.key(step_dir)}/{DAMAGED}", b"")
        self._complete = {folder for folder in self._complete if not folder.is_relative_to(step_dir)}

    def need(self, folder: Path) -> None:
        """Fetch what this machine lacks of a step, or of an item of one, and what the step has beside its items.

        Of several processes that share the directory one does it.
        """
        if folder in self._complete or folder.parent in self._complete:
            return
        with self._turn, self._alone():
            there = self._of(folder)
            lacking = [key for key, size in there.items() if _size(self.root / key) != size]
            in_parallel(lambda key: self.store.fetch(key, self.root / key), lacking)
            self._complete.add(folder)

    def mend(self, folder: Path) -> bool:
        """Fetch a step, or an item of one, anew whose copy here is damaged; whether the store has it."""
        with self._turn, self._alone():
            there = self._of(folder)
            if f"{self.key(_step_of(folder))}/{MANIFEST}" not in there:
                return False
            for path in [path for path in folder.rglob("*") if path.is_file()]:
                if self.key(path) not in there:
                    path.unlink()
            in_parallel(lambda key: self.store.fetch(key, self.root / key), there)
            return True

    def _of(self, folder: Path) -> dict[str, int]:
        """What the store has of a step, or of an item and beside it."""
        step = self.key(_step_of(folder))
        whole, inside = self.key(folder) == step, f"{self.key(folder)}/"
        return {
            key: size
            for key, size in self.store.sizes(step).items()
            if whole or key.startswith(inside) or "/" not in key.removeprefix(f"{step}/")
        }

    def close(self) -> None:
        """Send what is left, and let others have the lock. Raises Unreachable."""
        if self._lease:
            self.send(self.root)
            for key in [key for key in self._growing if "/" not in key]:  # of the run: no stage's mark comes for it
                self._growing.pop(key).finish(self.root / key)
            self._lease.release()

    def _finished(self, path: Path) -> bool:
        return any((above / COMPLETE).exists() for above in path.parents if above.is_relative_to(self.root))

    def _require(self) -> None:
        if self._lease:
            self._lease.require()

    def _send(self, key: str, path: Path) -> None:
        found = path.stat()
        was = (found.st_ino, found.st_mtime_ns, found.st_size)
        if self._sent.get(key) != was:
            self.store.send(key, path)
            self._sent[key] = was

    def _number(self) -> int:
        try:
            held = json.loads((self.root / STATE).read_text(encoding="utf-8"))
            return int(held["number"]) if held["url"] == self.store.url else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _catch_up(self, contents: Contents, whole: dict[str, dict[str, int]]) -> None:
        """Nobody else has written since: the store gets what it lacks, and nothing here is lost."""
        for key, found in contents.parts.items():
            self._growing.setdefault(key, Growing(self.store, key)).load(found)
        steps = {self.key(path): path for path in local_steps(self.root) if (path / MANIFEST).exists()}
        self._stub({step: held for step, held in whole.items() if step not in steps})
        for step in sorted(steps.keys() - whole.keys(), key=lambda step: int(step.rpartition("/")[2])):
            if _whole(steps[step]):
                self.publish_step(steps[step])
            else:  # it came without its arrays, and a launch was killed that deleted it
                shutil.rmtree(steps[step])
        lacking = [key for key in contents.files if not (self.root / key).exists()]
        in_parallel(lambda key: self.store.fetch(key, self.root / key), lacking)
        self.send(self.root)
        for mark in sorted(self.root.glob(f"*/{COMPLETE}")):
            self.finish(mark.parent)

    def _pull(self, contents: Contents) -> None:
        """The store counts: the directory becomes what is there, but for the arrays of steps, which `need` fetches."""
        whole, kept = contents.whole(), set[str]()
        for path in list(local_steps(self.root)):
            step = self.key(path)
            if step in whole and _bytes(path / MANIFEST) == self.store.read(f"{step}/{MANIFEST}"):
                kept.add(step)
            else:
                shutil.rmtree(path)
        wanted = contents.files.keys() | contents.parts.keys() | {f"{step}/" for step in kept}
        _clear(self.root, self.root, wanted)
        self._stub({step: held for step, held in whole.items() if step not in kept})
        in_parallel(lambda key: self.store.fetch(key, self.root / key), contents.files)
        for key in contents.files:
            found = (self.root / key).stat()
            self._sent[key] = found.st_ino, found.st_mtime_ns, found.st_size
        for key, parts in contents.parts.items():
            self._grow(key, parts, contents.files.get(key, -1))

    def _grow(self, key: str, found: dict[int, str], whole: int) -> None:
        """A file of its parts, unless they hold no more than an object of `whole` bytes."""
        growing, path = Growing(self.store, key), self.root / key
        held = growing.load(found, tidy=self._lease is not None)
        if len(held) <= whole:
            self.store.delete(found.values() if self._lease else ())
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(held)
        os.chmod(path, 0o600)
        growing.is_in(path)
        self._growing[key] = growing

    def _stub(self, steps: dict[str, dict[str, int]]) -> None:
        """Steps without their arrays: folders, small files, manifests of items, and the step's last."""
        files = ((step, name, size) for step, held in steps.items() for name, size in held.items())
        small = [f"{step}/{name}" for step, name, size in files if name != MANIFEST and _at_once(name, size)]
        for step, held in steps.items():
            for name in held:
                (self.root / step / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        in_parallel(lambda key: self.store.fetch(key, self.root / key), small)
        in_parallel(lambda step: self.store.fetch(f"{step}/{MANIFEST}", self.root / step / MANIFEST), steps)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self.root.with_name(f".{self.root.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _step_of(folder: Path) -> Path:
    """The step of an item; another folder itself."""
    above = folder.parent
    return above if above.name.isdigit() and above.parent.name == "checkpoints" else folder


def _at_once(name: str, size: int) -> bool:
    return size <= _SMALL or name.endswith(f"/{MANIFEST}")


def _whole(folder: Path) -> bool:
    """Whether all files are here that a manifest lists, and those in it."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        inner = [folder / name for name in listed if name.endswith(f"/{MANIFEST}")]
        here = all(_size(folder / name) == entry["size"] for name, entry in listed.items())
        return here and all(_whole(path.parent) for path in inner)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _older(meta: bytes) -> bool:
    try:
        return int(json.loads(meta).get("format", 1)) == 1
    except (ValueError, AttributeError, TypeError):
        return False


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _clear(root: Path, folder: Path, wanted: set[str]) -> None:
    """Remove files that the store has not, and folders that are empty then."""
    for path in list(folder.iterdir()):
        key = path.relative_to(root).as_posix()
        if f"{key}/" in wanted or path.name == ".lock":
            continue
        if path.is_dir() and not path.is_symlink():
            _clear(root, path, wanted)
            if not any(path.iterdir()):
                path.rmdir()
        elif key not in wanted:
            path.unlink()
