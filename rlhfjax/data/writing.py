"""Folders of prepared datasets: all or nothing.

A dataset is built in a staging folder inside the data directory and renamed into place when it is whole, so a killed
or failed preparation never leaves something that looks prepared.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.integrity import read_manifest as written_files
from rlhfjax.integrity import require_intact, sync, verifying, write_manifest

VERSION = "1.0.0"
MANIFEST = "rlhfjax.json"
_STAGING_PREFIX = ".incomplete-"
_SMALL = 1 << 16  # bytes; what describes a dataset is read whole whenever it is opened, records are not


def digests_file(split: str) -> str:
    """The name of the file with eight bytes of BLAKE2b of each record of a split, by which a changed one is found."""
    return f"rows-{split}.digests"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared dataset; empty for one that this package did not prepare."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: expected JSON, got {error}; delete the folder and prepare it again") from None


def require_whole(folder: Path) -> None:
    """Compare a prepared dataset with the manifest of its files, as far as that is cheap at every start.

    Names and sizes always, contents of small files too: counts, features and fingerprints are in these. Records lie in
    files that have checksums of their own, which reading compares; `rlhfjax verify` reads everything. A dataset of
    another program, or of an older version, has no manifest. Raises IntegrityError.
    """
    if verifying() and written_files(folder) is not None:
        require_intact(folder, "delete the folder and prepare it again", digests=False, small=_SMALL)


@contextlib.contextmanager
def staging(data_dir: Path) -> Iterator[Path]:
    """A private folder inside `data_dir` to build in. One writer at a time; what a killed one left is removed first."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (data_dir / ".lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write to the data directory {data_dir}: {error.strerror}; give another one") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees it when the process ends, however it ends
        for stale in data_dir.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=data_dir))
        try:
            yield stage
        except OSError as error:
            raise DataError(
                f"could not write a dataset to {data_dir}: {error}; make room, or give another one"
            ) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, data_dir: Path, datasets: Sequence[Path]) -> None:
    """Moves finished datasets (paths relative to both folders) into place, readable by the owner alone."""
    for relative in datasets:
        for folder, _, files in os.walk(stage / relative):
            os.chmod(folder, 0o700)
            for file in files:
                os.chmod(Path(folder, file), 0o600)
        write_manifest(stage / relative)
        target = data_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.rename(stage / relative, target)
        sync(target.parent)
