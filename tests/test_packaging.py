"""What is given out: a source distribution that is the whole checkout, a wheel without leftovers, a page with links."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LEFTOVER = "build/lib/rlhfjax/removed.py"
NOT_GIVEN_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "node_modules"
)


def build(kind, source, target):
    """Builds as an installer would, in a checkout where an older version was built in `build/`."""
    (source / LEFTOVER).parent.mkdir(parents=True, exist_ok=True)
    (source / LEFTOVER).write_text("old = True\n", encoding="utf-8")
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(target)], cwd=source, check=True, capture_output=True)
    [built] = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_GIVEN_OUT)
    with tarfile.open(build("sdist", folder / "checkout", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"rlhfjax-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """The wheel that is built from the source distribution."""
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


def files_in(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if not path.name.endswith((".pyc", ".pyo"))}


@pytest.mark.parametrize("folder", [".ci", "benchmarks", "configs", "docs", "launch", "rlhfjax", "tests"])
def test_source_distribution_has_every_file_of(unpacked, folder):
    assert files_in(ROOT / folder) <= files_in(unpacked / folder)


def test_source_distribution_has_what_make_needs_and_nothing_built(unpacked):
    expected = {path.name for pattern in ("*.md", "*.lock", "*.toml", "*.py") for path in ROOT.glob(pattern)}
    there = {path.name for path in unpacked.iterdir()}
    assert expected | {"Makefile", "MANIFEST.in", ".gitignore", ".dockerignore", "LICENSE"} <= there
    assert there & {".venv", ".git", "runs", "dist"} == set()
    with_leftover = [path for path in unpacked.rglob("removed.py") if path != unpacked / LEFTOVER]  # ours of the wheel
    assert with_leftover == []


def test_a_wheel_has_the_package_alone_and_nothing_of_an_old_build(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {f"rlhfjax/{name}" for name in files_in(ROOT / "rlhfjax")}
    configs = {f"rlhfjax/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert names == sources | configs


def test_links_and_pictures_lead_from_an_index_page_to_files_of_the_repository(wheel):
    [path] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = email.message_from_bytes(wheel.read(path))
    assert metadata["Description-Content-Type"] == "text/markdown"
    page, readme = metadata.get_payload(decode=True).decode(), (ROOT / "README.md").read_text(encoding="utf-8")
    targets = links(page)
    assert len(targets) == len(links(readme)) > 10
    for target in targets:
        assert target.startswith("https://"), f"{target} leads nowhere from an index page"
        file = re.fullmatch(
            r"https://(?:github|raw\.githubusercontent)\.com/rlhfjax/rlhfjax/(?:blob/)?HEAD/(.*)", target
        )
        if file:
            assert (ROOT / re.split("[?#]", file[1])[0]).is_file(), target
    plain = re.compile(r"\]\([^)]*\)")
    assert plain.sub("", page).strip() == plain.sub("", readme).strip()  # nothing else is changed


def links(markdown):
    """Where the links and pictures of a document lead, as a renderer reads them."""
    inline = [
        child for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown) for child in token.children or ()
    ]
    return [token.attrs.get("href") or token.attrs["src"] for token in inline if token.type in ("link_open", "image")]


def test_lock_files_name_no_host_and_pin_every_file():
    for path in [*ROOT.glob("*.lock"), *(ROOT / "launch" / "docker").glob("*.lock")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if "://" in line or "index" in line.split("=")[0] or "--find" in line] == []
        pins = [line for line in lines if re.match(r"[a-z0-9]", line)]
        assert pins
        assert all(re.match(r"[a-z0-9_.-]+==\S+ .*\\$", line) for line in pins)
        assert all(lines[lines.index(line) + 1].strip().startswith("--hash=sha256:") for line in pins)


def test_the_short_set_is_of_tests_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    [names] = re.findall(r"^SHORT := \$\(addprefix tests/,(.*)\)$", makefile, re.MULTILINE)
    assert [name for name in names.split() if not (ROOT / "tests" / name).exists()] == []
