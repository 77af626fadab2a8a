"""Flags of XLA, and whether the installed one takes them: it ends a process that gives it any other, without a reason.

Flags come and go with jaxlib's versions, so XLA itself is asked, in a process of its own that it may end. What it took
is kept for this version of jaxlib: an empty file named after the flags, in `$XDG_CACHE_HOME/rlhfjax/xla_flags`.
"""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhfjax.errors import ConfigError
from rlhfjax.fetch import default_cache_dir

# jax reads the flags when it starts its devices. Whatever else may be wrong with it is said where it is used.
_START = "try:\n  import jax; jax.devices()\nfinally:\n  print('alive')"


def words_of(text: str) -> list[str]:
    """The flags in a value of XLA_FLAGS; one that does not begin with a dash is the name of a file that holds them.

    Raises ConfigError when there is no such file.
    """
    text = text.strip()
    if text and not text.startswith("-"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"XLA_FLAGS={text}: expected flags, or a file with flags: {error.strerror}") from None
    return re.findall(r"(?:[^\s\"']|\"[^\"]*\"|'[^']*')+", text)


def refused(words: Sequence[str]) -> list[str]:
    """Those of the flags that the installed XLA does not know, or whose values it cannot read."""
    if _takes(words):
        return []
    return [word for word in words if not _takes([word])] or list(words)


def check_flags(environment: Mapping[str, str]) -> None:
    """Raises ConfigError when XLA would end the process for what XLA_FLAGS holds."""
    words = words_of(environment.get("XLA_FLAGS", ""))
    if bad := refused(words):
        raise ConfigError(f"XLA_FLAGS: expected flags of jaxlib {_version()}, got {' '.join(bad)}; take them out")


def _takes(words: Sequence[str]) -> bool:
    if not words or not _version():
        return True
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]
    known = default_cache_dir().with_name("xla_flags") / _version() / digest
    if known.exists():
        return True
    environment = os.environ | {"XLA_FLAGS": " ".join(words), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", _START], env=environment, capture_output=True, check=False)
    if b"alive" not in ended.stdout:
        return False
    try:
        known.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        known.touch()
    except OSError:
        pass  # then XLA is asked again next time
    return True


def _version() -> str:
    try:
        return importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return ""
