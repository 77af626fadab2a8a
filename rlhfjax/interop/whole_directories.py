"""Directories that are there as a whole or not at all."""

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhfjax import faults
from rlhfjax.errors import ConfigError
from rlhfjax.integrity import sync, write_manifest

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def check_target(target: Path, marker: str, force: bool) -> None:
    """Raises ConfigError when `target` holds something, unless it may be replaced.

    With `force` only a directory that this program wrote, which `marker` shows, may be: nobody's own files go.
    """
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    if not force:
        raise ConfigError(f"{target}: exists already; choose another path, or --force to replace it")
    if target.is_symlink() or not (target / marker).is_file():
        raise ConfigError(f"{target}: --force replaces only what rlhfjax wrote there, and it has no {marker}")


class Peers(Protocol):
    """The processes that do something together, as `rlhfjax.host.processes` has them."""

    def count(self) -> int: ...

    def barrier(self, name: str) -> None: ...

    def by_first(self, what: Callable[[], Any], name: str) -> str: ...


class Alone:
    """One process."""

    def count(self) -> int:
        return 1

    def barrier(self, name: str) -> None:
        pass

    def by_first(self, what: Callable[[], Any], name: str) -> str:
        return what() or ""


@contextmanager
def shared_directory(
    target: Path, marker: str, force: bool, peers: Peers, known: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """`whole_directory` of several processes on one file system: the first makes it, and puts it in its place."""
    with ExitStack() as stack:
        part = peers.by_first(lambda: str(stack.enter_context(whole_directory(target, marker, force, known))), "part")
        yield Path(part)
        peers.barrier("written")
        peers.by_first(stack.close, "whole")


@contextmanager
def whole_directory(
    target: Path, marker: str, force: bool = False, known: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends well and goes when it does not.

    Everything is on disk before the place is taken, with a manifest of it (`rlhfjax.integrity`); files are for their
    owner only. What a killed process left of an attempt at this target goes. `known` are entries of the manifest that
    need not be found again, when the block has ended. Raises as `check_target`.
    """
    target = Path(os.path.abspath(target))
    check_target(target, marker, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _tidy(target)
        own = f".{target.name}.{socket.gethostname()}-{os.getpid()}."
        part = Path(tempfile.mkdtemp(prefix=own, suffix=".part", dir=target.parent))  # mode 0700
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}; choose another path") from error
    try:
        yield part
        faults.reach("export", 0)
        for path in [*part.rglob("*"), part]:
            path.chmod(0o700 if path.is_dir() else 0o600)
        write_manifest(part, known=known or {})
        check_target(target, marker, force)
        if target.is_dir():
            old = part.with_suffix(".old")
            os.rename(target, old)
            os.rename(part, target)
            shutil.rmtree(old)
        else:
            os.rename(part, target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_PLACE:
            reason = f"{target}: could not be written: {error.strerror}; make room, or choose another path"
            raise ConfigError(reason) from error
        raise


def _tidy(target: Path) -> None:
    """Remove what processes of this machine that are no more left beside `target`, and give back what they moved."""
    host = re.escape(socket.gethostname())
    for path in target.parent.glob(f".{target.name}.*"):
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.{host}-(\d+)\.\w+\.(part|old)", path.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            os.rename(path, target)  # killed between the two renames
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
