"""The cache of compiled programs between runs: a directory of machine code that only its owner may fill."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rlhfjax.errors import DataError
from rlhfjax.places import user_cache

KEPT_BYTES = 2 * 2**30


def compile_cache_dir() -> Path:
    """Where compiled programs are kept: `$XDG_CACHE_HOME/rlhfjax/compiled`, or the same under `~/.cache`."""
    return user_cache("compiled", "JAX_COMPILATION_CACHE_DIR")


def use_compile_cache(
    report: Callable[[str], None], directory: Path | None = None, planned: Path | None = None
) -> bool:
    """Let jax keep what it compiles; False, with the reason reported, where that is not safe or not possible.

    An entry is machine code that later runs execute: the directory must be the user's own and nobody else may write
    there. Where `JAX_COMPILATION_CACHE_DIR` names one, that is used as it is, unless programs were `planned` in
    another; `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Entries that were not read for longest are removed
    beyond 2 GiB.
    """
    config: Any = jax.config
    if (config.jax_compilation_cache_dir and not planned) or not config.jax_enable_compilation_cache:
        return bool(config.jax_compilation_cache_dir)
    try:
        directory = planned or directory or compile_cache_dir()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _unsafe(directory)
        if problem is None:
            _prune(directory, KEPT_BYTES)
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except DataError as error:
        report(f"compiled programs are not kept: {error}")
        return False
    if problem:
        report(f"compiled programs are not kept: {directory}: {problem}")
        return False
    config.update("jax_compilation_cache_dir", str(directory))
    if planned:  # elsewhere: the place of XLA's own caches is a part of each program's key
        config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Reading an entry takes a few milliseconds, compiling the smallest program some twenty.
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return True


def _unsafe(directory: Path) -> str | None:
    """Why machine code from this directory must not be run, if so."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "expected a directory, got a link or a file; remove it"
    if found.st_uid != os.getuid():
        return f"it belongs to user {found.st_uid}; set JAX_COMPILATION_CACHE_DIR to a directory of yours"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write there (mode {stat.S_IMODE(found.st_mode):o}); empty it, then chmod 700"
    return None if os.access(directory, os.W_OK | os.X_OK) else "not writable"


def _prune(directory: Path, limit: int) -> None:
    """Remove the files that were not read or written for longest until the rest has at most `limit` bytes."""
    files = [(max(info.st_atime, info.st_mtime), info.st_size, entry.path) for entry, info in _files(directory)]
    kept = 0
    for _, size, path in sorted(files, reverse=True):
        kept += size
        if kept > limit:
            Path(path).unlink(missing_ok=True)


def _files(directory: Path) -> Iterator[tuple[os.DirEntry, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                if entry.is_file(follow_symlinks=False):
                    yield entry, entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another run removed it
                continue
