"""One prefix of a bucket: whole objects are written, read, listed and deleted, with patience for lost connections.

An object is there whole or not at all: a store shows none before its last byte came. What a file system has and a store
has not, renaming and locks, stands in `rlhfjax.stores.workshop` and `rlhfjax.stores.lease`.
"""

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.stores.urls import split

T = TypeVar("T")
WORKERS = 8
_PATIENCE = 300.0  # seconds that an operation is tried again
_PACKAGES = {"s3": ("s3fs", "s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role")}
_PACKAGES["gs"] = ("gcsfs", "gcs", "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the "
                   "machine's service account")  # fmt: skip
_DENIED = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError",
           "RefreshError", "PermissionError", "ProfileNotFound", "TokenRetrievalError")  # fmt: skip
_NETWORKS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "s3fs", "fsspec", "urllib3", "requests")


class Unreachable(OSError):
    """A store that did not answer, or answered with errors of its own, for as long as anybody waited."""


class Store(Protocol):
    """A prefix of a bucket. Keys are relative to it; `url` names it, `patience` is how long an operation is tried."""

    url: str
    patience: float

    def read(self, key: str) -> bytes:
        """An object. Raises FileNotFoundError."""
        ...

    def fetch(self, key: str, path: Path) -> None:
        """An object, into a file. Raises FileNotFoundError."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Put an object there, in the place of one of the same name."""
        ...

    def send(self, key: str, path: Path) -> None:
        """`write` of a file."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put an object there unless there is one of that name; whether it is there now and this one."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of all objects whose keys are below a prefix (a folder without its slash), by key."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in no order; those that are not there are no error."""
        ...


def in_parallel(do: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """`do` for each of the items, some at a time. Raises the first error."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(do, items):
            pass


class BucketStore:
    """A prefix in S3, or what speaks its protocol, or in Google Cloud Storage.

    Raises ConfigError where the package for it is not installed, DataError where the bucket is not there or the
    credentials do not open it; of each operation Unreachable, when no try of `patience` seconds came through.
    """

    def __init__(self, url: str, patience: float = _PATIENCE):
        scheme, bucket, prefix = split(url)
        self.url, self._bucket = f"{scheme}://{bucket}/{prefix}".rstrip("/"), bucket
        self._root, self._scheme, self.patience = f"{bucket}/{prefix}".rstrip("/"), scheme, patience
        self._files = _file_system(scheme)
        logging.getLogger("asyncio").addFilter(_not_of_lost_connections)
        self._tried(self._look)

    def read(self, key: str) -> bytes:
        return self._tried(lambda: self._files.cat_file(self._at(key)))

    def fetch(self, key: str, path: Path) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._tried(lambda: self._files.get_file(self._at(key), str(part)))
        os.chmod(part, 0o600)
        part.replace(path)

    def write(self, key: str, data: bytes) -> None:
        self._tried(lambda: self._files.pipe_file(self._at(key), data))

    def send(self, key: str, path: Path) -> None:
        self._tried(lambda: self._files.put_file(str(path), self._at(key)))

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._tried(lambda: self._files.pipe_file(self._at(key), data, mode="create"))
        except FileExistsError:  # perhaps by a try of ours whose answer was lost
            return self.read(key) == data
        return True

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {key: int(info["size"]) for key, info in self._listed(prefix).items()}

    def stamps(self, path: str) -> dict[str, str]:
        """The object of this key, or those below it: by key what changes when the object does."""
        found = self._listed(path)
        if not found:
            with suppress(FileNotFoundError):
                found = {path: self._tried(lambda: self._files.info(self._at(path)))}
        digests = ("ETag", "md5Hash", "etag")
        return {
            key: " ".join(str(info[name]) for name in ("size", *digests) if info.get(name))
            for key, info in found.items()
            if info["type"] == "file"
        }

    def _listed(self, prefix: str) -> dict[str, Any]:
        place = f"{self._root}/{prefix}".rstrip("/")
        try:
            found: Mapping[str, Any] = self._tried(lambda: self._files.find(place, detail=True))
        except FileNotFoundError:
            return {}
        cut = len(self._root) + 1
        return {
            name[cut:]: info
            for name, info in found.items()
            if info["type"] == "file" and name.startswith(f"{place}/") and not name.endswith("/")
        }

    def delete(self, keys: Iterable[str]) -> None:
        in_parallel(self._delete, keys)

    def _delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._tried(lambda: self._files.rm_file(self._at(key)))

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _look(self) -> None:
        """Raises DataError unless there is such a bucket; whether its objects can be listed is seen, too."""
        try:
            self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            try:
                self._files.ls(self._bucket, detail=False)
            except FileNotFoundError:
                raise DataError(
                    f"{self.url}: expected a bucket, got no {self._bucket!r} there; create it, or correct the address"
                ) from None

    def _tried(self, do: Callable[[], T]) -> T:
        """`do`, again and again while the network or the store fails, at growing intervals."""
        until, pause = time.monotonic() + self.patience, 0.1
        while True:
            try:
                return do()
            except (FileNotFoundError, FileExistsError, DataError):
                raise
            except Exception as error:
                if denied := self._denied(error):
                    raise denied from None
                if not _passes(error):
                    raise
                if time.monotonic() + pause > until:
                    told = next(iter(str(error).splitlines()), "") or type(error).__name__
                    raise Unreachable(
                        0, f"{self.url} did not answer for {self.patience:.0f} s: {told[:300]}", self.url
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _denied(self, error: BaseException) -> DataError | None:
        """What to raise for credentials that are missing or refused."""
        code = getattr(error, "code", None) or getattr(error, "status", None)
        if type(error).__name__ not in _DENIED and code not in (401, 403, "401", "403"):
            return None
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        return DataError(
            f"{self.url}: expected credentials that open the bucket, got {told[:200]}; set "
            f"{_PACKAGES[self._scheme][2]}, and see that they may list, read and write there"
        )


def _passes(error: BaseException) -> bool:
    """Whether an error is of the network or of the store, and not of this program."""
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORKS


def _not_of_lost_connections(record: logging.LogRecord) -> bool:
    """Of what else was under way on a connection that broke, asyncio would log a page each; it is all tried again."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not _passes(error)


def _file_system(scheme: str) -> Any:
    """Listings are never remembered: what counts is what is there now."""
    package, extra, _ = _PACKAGES[scheme]
    try:
        core = importlib.import_module(f"{package}.core")
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs a package that is not installed ({error.name}): pip install 'rlhfjax[{extra}]'"
        ) from None
    settings = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":  # whose client sends a checksum with everything
        return core.S3FileSystem(**settings)
    # Not gcsfs.ExtendedGcsFileSystem, which asks another service for the kind of the bucket first.
    return core.GCSFileSystem(consistency="md5", **settings)
