"""A directory is there as a whole or not at all, and nobody's own files are replaced."""

import os

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.interop.whole_directories import whole_directory


def write(target, text="new", force=False):
    with whole_directory(target, "mark", force) as part:
        assert part.stat().st_mode & 0o777 == 0o700
        (part / "mark").write_text(text)
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("x")


def fail(target, force):
    with whole_directory(target, "mark", force) as part:
        (part / "mark").write_text("half")
        raise ConfigError("half")


def names(folder):
    return sorted(os.listdir(folder))


def test_it_is_written_for_its_owner_only(tmp_path):
    write(tmp_path / "deep" / "target")
    target = tmp_path / "deep" / "target"
    modes = {path.name: path.stat().st_mode & 0o777 for path in [target, *target.rglob("*")]}
    assert modes == {"target": 0o700, "mark": 0o600, "inner": 0o700, "file": 0o600}
    assert names(tmp_path / "deep") == ["target"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "target").mkdir()
    write(tmp_path / "target")
    assert names(tmp_path / "target") == ["inner", "mark"]


def test_what_fails_leaves_nothing(tmp_path):
    write(tmp_path / "old", "old")
    for target, force in ((tmp_path / "target", False), (tmp_path / "old", True)):
        with pytest.raises(ConfigError, match="half"):
            fail(target, force)
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "mark").read_text() == "old"


def test_only_what_was_written_here_is_replaced(tmp_path):
    target = tmp_path / "target"
    write(target, "old")
    with pytest.raises(ConfigError, match="exists already"):
        write(target)
    write(target, "new", force=True)
    assert (target / "mark").read_text() == "new"
    assert names(tmp_path) == ["target"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(target)
    for own in ("mine", "file", "link"):
        with pytest.raises(ConfigError, match="--force replaces only what rlhfjax wrote"):
            write(tmp_path / own, force=True)
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert (target / "mark").read_text() == "new"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "file" / "target")
