"""A directory is there as a whole or not at all, and nobody's own files are replaced."""

import os
import socket
import subprocess
import sys

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.integrity import MANIFEST, check
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
    assert modes == {"target": 0o700, "mark": 0o600, "inner": 0o700, "file": 0o600, MANIFEST: 0o600}
    assert names(tmp_path / "deep") == ["target"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "target").mkdir()
    write(tmp_path / "target")
    assert names(tmp_path / "target") == [MANIFEST, "inner", "mark"]


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


KILLED = """
import os, signal, sys
from pathlib import Path
from rlhfjax.interop import whole_directories
from rlhfjax.interop.whole_directories import whole_directory
if sys.argv[2] == "swap":  # between the two renames of --force
    whole_directories.os.rename = lambda one, other, real=os.rename: (real(one, other), os.kill(os.getpid(), 9))
with whole_directory(Path(sys.argv[1]), "mark", force=True) as part:
    (part / "mark").write_text("new")
    if sys.argv[2] == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["inside", "swap"])
def test_a_killed_attempt_harms_nothing_and_goes_with_the_next(tmp_path, when):
    # fails without the part that gives a moved directory back: seen
    target = tmp_path / "target"
    write(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 2  # and what the process left
    if when == "inside":
        assert (target / "mark").read_text() == "old"
    with pytest.raises(ConfigError, match="half"):
        fail(target, force=True)
    assert names(tmp_path) == ["target"]
    assert (target / "mark").read_text() == "old"
    assert check(target).differences == ()


def test_what_another_process_is_writing_stays(tmp_path):
    theirs = tmp_path / f".target.{socket.gethostname()}-{os.getppid()}.abc.part"
    elsewhere = tmp_path / ".target.another-machine-1.abc.part"
    for folder in (theirs, elsewhere):
        folder.mkdir()
    write(tmp_path / "target")
    assert theirs.is_dir()
    assert elsewhere.is_dir()
