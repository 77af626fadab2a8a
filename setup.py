"""What pyproject.toml cannot say: where `configs/` goes, README for an index page, no old `build/` in a wheel."""

import re
import tempfile
import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build import build

HERE = Path(__file__).resolve().parent
_LINK = re.compile(
    r"(!?\[[^\[\]]*\])\((?![a-z]+:|#)([^()\s]+)\)"
)  # [text](path) and ![text](path), not [text](https:…)


def index_page(text: str, repository: str) -> str:
    """Markdown whose links and pictures lead from anywhere to the files of the repository."""
    raw = repository.replace("//github.com/", "//raw.githubusercontent.com/")

    def absolute(link: re.Match[str]) -> str:
        if not link[1].startswith("!"):
            return f"{link[1]}({repository}/blob/HEAD/{link[2]})"
        kind = "?sanitize=true" if link[2].endswith(".svg") else ""  # else it is sent as text
        return f"{link[1]}({raw}/HEAD/{link[2]}{kind})"

    return _LINK.sub(absolute, text)


class FreshBuild(build):
    """Builds in a folder of its own: what an older version left in `build/` does not get into a wheel."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self._folder = tempfile.TemporaryDirectory(prefix="rlhfjax-build-")
        self.build_base = self._folder.name


project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
setup(
    packages=[*find_namespace_packages(include=["rlhfjax*"]), "rlhfjax.configs"],
    package_dir={"rlhfjax.configs": "configs"},
    long_description=index_page((HERE / "README.md").read_text(encoding="utf-8"), project["urls"]["Repository"]),
    long_description_content_type="text/markdown",
    cmdclass={"build": FreshBuild},
)
