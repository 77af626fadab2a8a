"""The code that runs: digests of the installed package, and the commit of the checkout that it may come from."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from rlhfjax.fetch import file_sha256

PACKAGE = Path(__file__).resolve().parents[1]
_SHORT = 12  # hexadecimal digits that tell the versions of one file apart


def package_digests(package: Path = PACKAGE) -> dict[str, Any]:
    """`sha256` over all source files and templates of the package, and the beginning of each file's own.

    It is the same for a checkout and for the wheel that was built from it; configurations are recorded resolved.
    """
    files = {
        path.relative_to(package).as_posix(): file_sha256(path)
        for path in sorted(package.rglob("*"))
        if path.suffix == ".py" or path.parent.name == "templates"
    }
    files = {name: digest for name, digest in files.items() if not name.startswith("configs/")}
    whole = hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in files.items()).encode()).hexdigest()
    return {"sha256": whole, "files": {name: digest[:_SHORT] for name, digest in files.items()}}


def commit(root: Path = PACKAGE.parent) -> dict[str, Any] | None:
    """Commit, whether the tree differs from it, and the digest of that difference; None outside of a checkout."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout

    try:
        facts = {"sha": git("rev-parse", "HEAD").decode().strip(), "dirty": bool(git("status", "--porcelain"))}
        difference = git("diff", "--binary", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or a repository that it refuses to read
    return facts | ({"diff_sha256": hashlib.sha256(difference).hexdigest()} if difference else {})


def lock_digest(root: Path = PACKAGE.parent) -> str | None:
    """SHA-256 of the lock file of a checkout."""
    lock = root / "requirements.lock"
    return file_sha256(lock) if lock.exists() else None
