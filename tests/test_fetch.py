"""Fetching with the real pip from a local folder in place of an index: pinned bytes or nothing."""

import hashlib
import os
import sys
import zipfile

import pytest

from rlhfjax import fetch as fetching
from rlhfjax.errors import DataError
from rlhfjax.fetch import PinnedFile, default_cache_dir, fetch

WHEEL = "tiny_thing-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_thing.py", "")
        wheel.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr("tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def pinned(index):
    """The wheel, pinned by its true digest."""
    return PinnedFile("tiny-thing==1.0", WHEEL, hashlib.sha256((index / WHEEL).read_bytes()).hexdigest())


def test_fetched_once_then_from_the_cache(index, pinned, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = fetch(pinned, cache)
    assert path == cache / WHEEL
    assert path.read_bytes() == (index / WHEEL).read_bytes()
    assert os.listdir(cache) == [WHEEL]
    monkeypatch.setattr(fetching, "_pip_download", None)  # would fail if pip were asked again
    assert fetch(pinned, cache) == path


def test_a_corrupt_cached_file_is_fetched_again(pinned, tmp_path):
    cache = tmp_path / "cache"
    good = fetch(pinned, cache).read_bytes()
    (cache / WHEEL).write_bytes(good[:-1])
    assert fetch(pinned, cache).read_bytes() == good


def test_other_bytes_are_refused_by_pip_and_by_us(pinned, tmp_path, monkeypatch):
    wrong = PinnedFile(pinned.requirement, WHEEL, "0" * 64)
    with pytest.raises(DataError, match=r"could not fetch tiny-thing==1\.0 with pip"):
        fetch(wrong, tmp_path / "cache")

    def careless_pip(pinned, work, cache_dir):
        (work / pinned.filename).write_bytes(b"other")
        return work / pinned.filename

    monkeypatch.setattr(fetching, "_pip_download", careless_pip)
    with pytest.raises(DataError, match=rf"expected SHA-256 {'0' * 64}, got {hashlib.sha256(b'other').hexdigest()}"):
        fetch(wrong, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_offline_says_what_to_do_and_leaves_nothing(index, pinned, tmp_path):
    (index / WHEEL).unlink()
    with pytest.raises(DataError) as error:
        fetch(pinned, tmp_path / "cache")
    assert "could not fetch tiny-thing==1.0 with pip" in str(error.value)
    assert f"put {WHEEL} in {tmp_path / 'cache'}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert os.listdir(tmp_path / "cache") == []


def test_without_pip(pinned, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DataError, match=r"with pip \(FileNotFoundError\); install pip and go online, or put"):
        fetch(pinned, tmp_path / "cache")


def test_a_cache_that_cannot_be_made(pinned, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to the download cache"):
        fetch(pinned, tmp_path / "file" / "cache")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "rlhfjax" / "downloads"
