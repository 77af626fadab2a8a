"""Where a user keeps things, who may have neither a name nor a home."""

from pathlib import Path

import pytest

from rlhfjax.data.datasets import default_data_dir
from rlhfjax.errors import DataError
from rlhfjax.fetch import default_cache_dir
from rlhfjax.host.compile_cache import compile_cache_dir
from rlhfjax.places import expanded, user_cache


@pytest.fixture
def homeless(monkeypatch):
    """As in a container that runs as --user 12345."""
    for name in ("HOME", "XDG_CACHE_HOME", "RLHFJAX_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.setattr(Path, "home", lambda: unknown("~"))


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        (default_data_dir, "--data-dir DIR, data_dir in the configuration, RLHFJAX_DATA_DIR or XDG_CACHE_HOME"),
        (default_cache_dir, "--cache-dir DIR or XDG_CACHE_HOME"),
        (compile_cache_dir, "JAX_COMPILATION_CACHE_DIR or XDG_CACHE_HOME"),
    ],
)
def test_without_a_home_another_place_is_asked_for(homeless, place, remedy):
    # fails with RuntimeError, exit code 1, without the translation: seen
    with pytest.raises(DataError, match=f"has no home directory, and HOME is not set; give another one: {remedy}"):
        place()


def test_a_cache_that_is_named_needs_no_home(homeless, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("things", "nothing") == tmp_path / "rlhfjax" / "things"


def test_the_home_of_nobody_is_no_path(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/data") == Path("/somewhere/data")
    assert expanded("data") == Path("data")
    with pytest.raises(DataError, match="~nobody-at-all/x: expected a path"):
        expanded("~nobody-at-all/x")
