"""Addresses in object stores, and the directory of this machine that stands for one."""

import os
import re
from pathlib import Path

from rlhfjax.errors import ConfigError
from rlhfjax.places import user_cache

SCRATCH = "RLHFJAX_SCRATCH"
_URL = re.compile(r"^(s3|gs):/{1,2}([^/]+)(?:/+(.*))?$", re.DOTALL)


def is_url(path: str | Path) -> bool:
    """Whether this is an address in an object store; a Path that was made of one, with a slash less, is it too."""
    return re.match(r"^(s3|gs):/", str(path)) is not None


def split(path: str | Path) -> tuple[str, str, str]:
    """Scheme, bucket and prefix (without slashes at its ends) of an address.

    Raises ConfigError for one without a bucket or that goes upwards.
    """
    found = _URL.match(str(path))
    parts = [part for part in (found[3] or "").split("/") if part] if found else []
    if not found or {".", ".."} & {found[2], *parts}:
        raise ConfigError(f"{path}: expected s3://BUCKET/NAME or gs://BUCKET/NAME, got no such address")
    return found[1], found[2], "/".join(parts)


def url_of(path: str | Path) -> str:
    """The address as it is written: `s3://bucket/run`."""
    scheme, bucket, prefix = split(path)
    return f"{scheme}://{bucket}/{prefix}".rstrip("/")


def directory_of(path: str | Path, use: str = "work") -> Path:
    """Where this machine keeps its copy: `$RLHFJAX_SCRATCH` or the user's cache, by use, scheme, bucket and prefix.

    A run works in such a directory; what is read of others lies in one of another `use`. Raises DataError for a user
    without a home and without either variable.
    """
    scheme, bucket, prefix = split(path)
    given = os.environ.get(SCRATCH)
    root = Path(given).absolute() if given else user_cache("stores", SCRATCH).absolute()
    return root / use / scheme / bucket / prefix
