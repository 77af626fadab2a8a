"""Manifests: the size and SHA-256 of every file that a directory held when it was written, in one file beside them.

Neither Orbax nor safetensors notices a flipped bit in an array, so checkpoints, exports and prepared data carry this
manifest, and it is compared before anything is read. A directory below that has a manifest of its own is covered
through it: only the inner manifest is listed in the outer one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfjax.errors import IntegrityError

MANIFEST = "MANIFEST.sha256.json"
_FORMAT = 1
_WORKERS = min(8, os.cpu_count() or 1)  # hashing gives the interpreter's lock back
_SHOWN = 3


@dataclass(frozen=True)
class Difference:
    """One file that is not what the manifest says; `problem` is missing, extra, size, digest or unreadable."""

    file: str
    problem: str
    expected: str = ""
    got: str = ""

    def __str__(self) -> str:
        if self.problem in ("missing", "extra"):
            return f"{self.file}: {'is missing' if self.problem == 'missing' else 'does not belong there'}"
        if self.problem == "unreadable":
            return f"{self.file}: cannot be read: {self.got}"
        return f"{self.file}: expected {self.problem} {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Checked:
    """What a check read: `files` and `bytes` count what was compared, `differences` what was wrong with it."""

    files: int
    bytes: int
    differences: tuple[Difference, ...]


def write_manifest(directory: Path, *, known: Mapping[str, Mapping[str, Any]] | None = None, **facts: Any) -> None:
    """Write the manifest of all that is in `directory`, with `facts` beside it; everything is on the disk afterwards.

    Files and folders are synced first, then the manifest is written under another name, synced and renamed, so that
    one that is there is whole. The entries of files in `known` are taken as given: whoever wrote these hashed and
    synced them.
    """
    given = known or {}
    files: dict[str, Mapping[str, Any]] = {name: given.get(name, {}) for name in _names(directory)}
    files |= synced_entries(directory, [name for name, entry in files.items() if not entry])
    for folder in {path.parent for path in map(directory.joinpath, files)} - {directory}:
        sync(folder)
    held = {"format": _FORMAT, "files": files} | facts
    part = directory / f"{MANIFEST}.part"
    part.write_text(_text(held), encoding="utf-8")
    os.chmod(part, 0o600)
    sync(part)
    os.replace(part, directory / MANIFEST)
    sync(directory)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, None where it has none. Raises IntegrityError when it is not what was written."""
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text)
        whole = _text({name: value for name, value in held.items() if name != "sha256"}) == text
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: expected a manifest, got {type(error).__name__} on reading it") from None
    if not whole or not _well_formed(held):
        raise IntegrityError(f"{path}: expected a manifest as it was written, got one that was changed")
    return held


def _well_formed(held: Mapping[str, Any]) -> bool:
    """Whether a manifest has the parts that are read of it: a directory may come from anywhere."""
    files, leaves, arrays = held.get("files"), held.get("leaves", {}), held.get("arrays", {})
    if held.get("format") != _FORMAT or not isinstance(files, dict):
        return False
    if not isinstance(leaves, dict) or not isinstance(arrays, dict):
        return False
    entries = all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
    named = all(isinstance(item, dict) and all(map(_is_text, item.values())) for item in leaves.values())
    return entries and named and all(map(_is_text, arrays.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def check(directory: Path, digests: bool = True, small: int = 0) -> Checked:
    """Compare a directory with its manifest: names and sizes, and with `digests` the contents.

    Without them only files of at most `small` bytes are read. Raises IntegrityError where there is no manifest, or none
    that can be read.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise IntegrityError(f"{directory}: expected {MANIFEST} in it, got none; nothing says what it should hold")
    return _compare(directory, "", manifest["files"], digests, small)


def require_intact(directory: Path, remedy: str, digests: bool = True, small: int = 0) -> Checked:
    """`check` that raises IntegrityError when something differs; it names the files, and `remedy` says what to do."""
    return _required(directory, check(directory, digests, small), remedy)


def require_part(directory: Path, part: str, remedy: str, digests: bool = True, small: int = 0) -> Checked:
    """`require_intact` of a folder with a manifest of its own, and of files beside it; nothing of others is read."""
    listed, name = (read_manifest(directory) or {"files": {}})["files"], f"{part}/{MANIFEST}"
    if name not in listed:
        raise IntegrityError(f"{directory}: expected {name} in its {MANIFEST}, got none; {remedy}")
    beside = (
        _differs(directory / file, file, entry, digests, small) for file, entry in listed.items() if "/" not in file
    )
    first = (_differs(directory / name, name, listed[name], True, 0), *beside)
    if wrong := tuple(difference for difference in first if difference):
        return _required(directory, Checked(0, 0, wrong), remedy)
    inner = read_manifest(directory / part)
    return _required(
        directory, _compare(directory, f"{part}/", inner["files"] if inner else {}, digests, small), remedy
    )


def _required(directory: Path, checked: Checked, remedy: str) -> Checked:
    if checked.differences:
        shown = "; ".join(map(str, checked.differences[:_SHOWN]))
        more = len(checked.differences) - _SHOWN
        raise IntegrityError(f"{directory}: {shown}{f' and {more} more' if more > 0 else ''}; {remedy}")
    return checked


def bytes_of(directory: Path) -> int:
    """Bytes of all files that a manifest covers, by what it says. Raises IntegrityError as `read_manifest`."""
    files = (read_manifest(directory) or {"files": {}})["files"]
    return sum(entry["size"] for entry in files.values()) + sum(bytes_of(directory / name) for name in _nested(files))


def sync(path: Path) -> None:
    """Return when the file, or the directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What was found whole is not hashed again in this process, unless its manifest is another one by now.
_found_whole: set[tuple[str, int, int]] = set()
_verify = True


def verified_once(directory: Path, remedy: str) -> None:
    """`require_intact` the first time in a process; nothing inside `unverified`."""
    if not _verify:
        return
    key = _identity(directory)
    if key is None or key not in _found_whole:
        require_intact(directory, remedy)
        _found_whole.update([key] if key else [])


def verifying() -> bool:
    """Whether what is read is compared with its digests."""
    return _verify


@contextmanager
def unverified(skip: bool = True) -> Iterator[None]:
    """Inside, nothing is compared with its manifest (`--no-verify`). Of the process, not of a thread."""
    global _verify
    before, _verify = _verify, not skip and _verify
    try:
        yield
    finally:
        _verify = before


def _identity(directory: Path) -> tuple[str, int, int] | None:
    try:
        found = (directory / MANIFEST).stat()
    except OSError:
        return None
    return os.path.abspath(directory), found.st_ino, found.st_mtime_ns


def _names(directory: Path) -> list[str]:
    """Files below a directory, relative to it; of a folder with a manifest of its own only that."""
    return sorted(path.relative_to(directory).as_posix() for path in _walk(directory))


def _walk(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        if here != directory and MANIFEST in files:
            folders.clear()
            yield here / MANIFEST
            continue
        yield from (here / file for file in files if here != directory or file not in (MANIFEST, f"{MANIFEST}.part"))
        yield from (here / name for name in folders if (here / name).is_symlink())  # listed, never followed


def synced_entries(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a manifest says of some files, which are on the disk afterwards."""
    names = list(names)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return dict(zip(names, pool.map(lambda name: _synced_entry(directory / name), names), strict=True))


def _synced_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest}


def _compare(root: Path, inside: str, listed: Mapping[str, Any], digests: bool, small: int) -> Checked:
    directory = root / inside
    found = set(_names(directory))
    differences = [Difference(inside + name, "missing") for name in sorted(listed.keys() - found)]
    differences += [Difference(inside + name, "extra") for name in sorted(found - listed.keys())]
    there = [name for name in listed if name in found]
    with ThreadPoolExecutor(_WORKERS) as pool:
        compared = pool.map(lambda name: _differs(directory / name, inside + name, listed[name], digests, small), there)
        differences += [difference for difference in compared if difference]
    files, size = 1 + len(there), sum(listed[name]["size"] for name in there)
    for name in _nested(there):
        try:
            inner = read_manifest(root / inside / name)
            part = _compare(root, f"{inside}{name}/", inner["files"] if inner else {}, digests, small)
        except IntegrityError as error:
            part = Checked(0, 0, (Difference(f"{inside}{name}/{MANIFEST}", "unreadable", got=str(error)),))
        files, size, differences = files + part.files - 1, size + part.bytes, [*differences, *part.differences]
    return Checked(files, size, tuple(differences))


def _nested(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")]


def _differs(path: Path, name: str, entry: Mapping[str, Any], digests: bool, small: int) -> Difference | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return Difference(name, "size", f"{entry['size']}", f"{size} bytes")
        if not digests and size > small:
            return None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Difference(name, "unreadable", got=error.strerror or str(error))
    if digest != entry["sha256"]:
        return Difference(name, "digest", f"SHA-256 {entry['sha256'][:12]}…", f"{digest[:12]}…")
    return None


def _text(held: Mapping[str, Any]) -> str:
    """The manifest's text; its last entry is the digest of the others, so that it too can be seen to be whole."""
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    return json.dumps(dict(held) | {"sha256": digest}, indent=1, ensure_ascii=False) + "\n"
