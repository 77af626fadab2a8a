"""Step directories on a disk that does not let go of what is deleted, as one of a network does of open files."""

import os
import shutil

import pytest

from rlhfjax.integrity import write_manifest
from rlhfjax.training.checkpoint import steps


@pytest.mark.parametrize(("move", "ending"), [(steps.remove, "removed"), (steps.set_aside, "damaged")])
def test_a_step_is_moved_whatever_bears_the_name_already(tmp_path, monkeypatch, move, ending):
    # fails where the deletion of what was moved before is taken for done: OSError, and no save after it
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        for count in range(3):
            (tmp_path / "2" / str(count)).mkdir(parents=True)
            move(tmp_path / "2")
    names = [f"2.2.{ending}", f"2.3.{ending}", f"2.{ending}"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [os.listdir(tmp_path / name) for name in names] == [["1"], ["2"], ["0"]]
    assert steps.steps_in(tmp_path) == []
    steps.tidy(tmp_path, print)
    assert sorted(os.listdir(tmp_path)) == ([] if ending == "removed" else names)


def test_of_two_that_were_to_be_replaced_the_later_one_comes_back(tmp_path):
    for name in ("2.replaced", "2.2.replaced"):
        (tmp_path / name / name).mkdir(parents=True)
    steps.tidy(tmp_path, print)
    assert os.listdir(tmp_path / "2") == ["2.2.replaced"]


def test_the_next_step_needs_the_room_of_the_last_one(tmp_path, monkeypatch):
    """1.2 times 4,000 bytes after step 10, whatever step 9 took and whatever was estimated."""
    for step, size in ((9, 1000), (10, 4000)):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "array").write_bytes(bytes(size))
        write_manifest(tmp_path / str(step), leaves={})
    for free, enough in ((4799, False), (4800, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(9999, 0, free))
        assert (steps.shortage(tmp_path, 1) is None) == enough
    assert steps.shortage(tmp_path / "none", 4000) is None
    assert "needs 0.0 MB" in str(steps.shortage(tmp_path / "none", 4001))
