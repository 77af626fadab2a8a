"""A virtual environment for each peer, with pinned versions, outside the project: what is compared needs none of ours.

    python -m benchmarks.peers.environments [NAME…]

They lie in ~/.cache/rlhfjax/peers, or in the folder that BENCHMARK_PEERS names. PyTorch is its CPU build, which PyPI
does not have: where pip's own indexes lack it, PIP_EXTRA_INDEX_URL must name one that has it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PEERS = ("trl", "trl_ppo", "tunix")  # whose speed is measured; `maxtext` is only compiled


def home() -> Path:
    """Where the environments are."""
    return Path(os.environ.get("BENCHMARK_PEERS", Path.home() / ".cache" / "rlhfjax" / "peers"))


def python_of(name: str) -> Path:
    """The interpreter of a peer."""
    return home() / name / "bin" / "python"


def is_installed(name: str) -> bool:
    """Whether its environment holds what its list of packages says now."""
    stamp = home() / name / "installed"
    return stamp.is_file() and stamp.read_text("utf-8") == _digest(name)


def install(name: str) -> None:
    """Make the environment of a peer anew. Raises CalledProcessError when pip fails."""
    folder = home() / name
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python_of(name)), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    wanted = packages(name)
    # First PyTorch alone, so that nothing else chooses its build.
    for some in ([p for p in wanted if p.startswith("torch==")], wanted):
        if some:
            subprocess.run([*pip, *some], check=True)
    (folder / "installed").write_text(_digest(name), "utf-8")


def packages(name: str) -> list[str]:
    """What its environment is made of: packages with their versions."""
    return (FOLDER / f"{name}.txt").read_text("utf-8").split()


def _digest(name: str) -> str:
    return hashlib.sha256((FOLDER / f"{name}.txt").read_bytes()).hexdigest()


def main(names: Sequence[str]) -> int:
    for name in names or PEERS:
        if is_installed(name):
            print(f"{name}: installed in {home() / name}")
            continue
        print(f"{name}: installing {', '.join(packages(name))}", flush=True)
        try:
            install(name)
        except subprocess.CalledProcessError as error:
            print(f"error: {name}: pip ended with {error.returncode}; see its lines above", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
