"""Damaged, half written and unwanted checkpoints: refused or fallen back from, never loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import ConfigError, IntegrityError, Stopped
from rlhfjax.integrity import MANIFEST, unverified
from rlhfjax.training.checkpoint import Checkpoints, items, steps, stored_digests
from rlhfjax.training.digests import leaf_digests
from rlhfjax.training.state import abstract

META = {"format": 2, "role": "policy"}


def models(step):
    return {"policy": {"a": jnp.full((3, 5), 0.5 * step), "b": jnp.arange(4.0) + step}}


def training(step):
    return ({"mu": jnp.full((3, 5), 0.25 * step)}, jnp.int32(step))


def save_steps(directory, *numbers, keep=5, **settings):
    checkpoints = Checkpoints(directory, keep, **settings)
    for step in numbers:
        checkpoints.save(step, models(step), training(step), META)
    checkpoints.close()


def newest(directory, **settings):
    """The step that training goes on from, and what was said."""
    said = []
    checkpoints = Checkpoints(directory, 5, report=said.append, **settings)
    try:
        restored = checkpoints.restore_newest(abstract(models(0)), abstract(training(0)))
    finally:
        checkpoints.close()
    if restored is None:
        return None, said
    found, (_, step), meta = restored
    assert meta["step"] == int(step)
    assert leaf_digests(found) == leaf_digests(models(int(step)))
    return int(step), said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2."""
    directory = tmp_path_factory.mktemp("stage") / "checkpoints"
    save_steps(directory, 1, 2)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flipped, halved, os.unlink], ids=["flipped", "halved", "deleted"])
def test_any_damaged_file_is_noticed_and_the_step_before_is_taken(saved, tmp_path, damage):
    # fails when a step without a manifest is believed, and when nothing is verified: seen
    files = sorted(path.relative_to(saved / "2") for path in (saved / "2").rglob("*") if path.is_file())
    assert {"meta/metadata", MANIFEST, "_CHECKPOINT_METADATA", "policy/_METADATA"} <= {str(path) for path in files}
    directory = tmp_path / "checkpoints"
    for number, name in enumerate(path for path in files if (saved / "2" / path).stat().st_size):
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        damage(directory / "2" / name)
        with pytest.raises(IntegrityError, match=str(name)):
            newest(directory, fall_back=False)
        if number % 5 == 0:  # the rest of the way is the same for each
            step, said = newest(directory)
            assert step == 1
            assert str(name) in said[0]
            assert said[0].endswith("set aside as 2.damaged; going on from step 1")
            assert newest(directory) == (1, [])


def test_none_that_is_whole_is_an_error_and_nothing_is_moved(copied):
    for step in "12":
        flipped(copied / step / "meta" / "metadata")
    with pytest.raises(IntegrityError, match=r"2: meta/metadata: expected digest .*\(no older step in .* is whole\)"):
        newest(copied)
    assert steps.steps_in(copied) == [1, 2]


def test_other_bits_than_were_saved_are_noticed_when_the_files_are_whole(copied, monkeypatch):
    # as when memory or a restore onto another mesh goes wrong; fails without the check of the arrays: seen
    checkpoints = Checkpoints(copied, 5)
    read = items.read_tree

    def wrong(folder, target, stored):
        found, _ = read(folder, target, stored)
        if folder.name == "policy":
            a = np.array(found["a"])
            a.view(np.uint32)[1, 2] ^= 1
            found["a"] = jnp.asarray(a)
        return found, {}

    monkeypatch.setattr(items, "read_tree", wrong)
    with pytest.raises(IntegrityError, match="expected policy/a as it was saved, got other bits"):
        checkpoints.restore(2, abstract(models(0)), abstract(training(0)))
    with unverified():
        checkpoints.restore(2, abstract(models(0)), abstract(training(0)))
    checkpoints.close()


def test_digests_of_arrays_lie_beside_those_of_files(saved):
    found = stored_digests(saved / "2")
    assert found["policy"] == leaf_digests(models(2)["policy"])
    assert found["training"] == leaf_digests(training(2))


def test_what_a_killed_process_left_goes_and_nothing_is_lost(copied):
    shutil.copytree(copied / "2", copied / "3.part")
    (copied / "4.part.orbax-checkpoint-tmp-17").mkdir()
    os.rename(copied / "1", copied / "1.removed")
    os.rename(copied / "2", copied / "2.replaced")  # killed while another 2 was about to take its place
    (copied / "notes").mkdir()
    step, said = newest(copied)
    assert step == 2
    assert sorted(os.listdir(copied)) == ["2", "notes"]
    assert [line.partition(": ")[0] for line in said] == [str(copied / "3"), str(copied / "4")]


def test_a_step_is_replaced_by_one_of_its_number(copied):
    # fails when what tensorstore keeps of a step is asked for again: seen
    checkpoints = Checkpoints(copied, 5)
    checkpoints.restore(2, abstract(models(0)), abstract(training(0)))
    checkpoints.save(2, models(9), training(2), META)
    found, _, _ = checkpoints.restore(2, abstract(models(0)), abstract(training(0)))
    assert leaf_digests(found) == leaf_digests(models(9))
    checkpoints.close()
    assert stored_digests(copied / "2")["policy"] == leaf_digests(models(9)["policy"])
    assert sorted(os.listdir(copied)) == ["1", "2"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep": 2}, [6, 7]),
        ({"keep": 1, "keep_every": 3}, [3, 6, 7]),
        ({"keep": 1, "best_metric": "loss"}, [2, 7]),
        ({"keep": 1, "best_metric": "-loss"}, [5, 7]),
        ({"keep": 2, "keep_every": 4, "best_metric": "-loss", "keep_best": True}, [1, 4, 5, 6, 7]),
        ({"keep": 1, "best_metric": "another"}, [7]),
    ],
)
def test_which_steps_stay(tmp_path, settings, kept):
    losses, scores = [3, 9, 4, 9, 1, 2, 8], [7, 1, 2, 3, 4, 5, 6]
    losses[3] = 8
    checkpoints = Checkpoints(tmp_path, **settings)
    for step, (loss, score) in enumerate(zip(losses, scores, strict=True), 1):
        checkpoints.save(step, models(step), training(step), META, score, {"loss": float(loss)})
    checkpoints.close()
    assert steps.steps_in(tmp_path) == kept


def test_a_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    for name in ("file", "gone"):
        with pytest.raises(ConfigError, match=rf"{name}: expected a directory to save checkpoints in, got .*--run-dir"):
            Checkpoints(tmp_path / name, 1)


def free(megabytes):
    return lambda path: shutil._ntuple_diskusage(10**12, 10**12, int(megabytes * 1e6))


def test_no_room_is_said_before_a_save_begins(copied, monkeypatch):
    # fails when the size of the last step is not asked for: seen
    checkpoints = Checkpoints(copied, 5)
    size = sum(path.stat().st_size for path in (copied / "2").rglob("*") if path.is_file()) / 1e6
    monkeypatch.setattr(shutil, "disk_usage", free(1.3 * size))
    checkpoints.save(3, models(3), training(3), META)
    checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", free(1.1 * size))
    message = r"4 could not be saved: .*a checkpoint needs .* MB, and .* MB are free\nstep 3 is whole; make room"
    with pytest.raises(Stopped, match=message) as stopped:
        checkpoints.save(4, models(4), training(4), META)
    assert stopped.value.exit_code == 42
    with pytest.raises(ConfigError, match="make room, or use another --run-dir"):
        checkpoints.restore_newest(abstract(models(0)), abstract(training(0)))
    checkpoints.close()
    assert steps.steps_in(copied) == [1, 2, 3]


@pytest.mark.parametrize("where", ["orbax", "manifest"])
def test_a_save_that_fails_is_raised_at_the_next_batch(copied, monkeypatch, where):
    # fails when `watched` only passes batches on: seen
    checkpoints = Checkpoints(copied, 5)
    stream = checkpoints.watched(iter(range(5)))
    assert next(stream) == 0
    finished = checkpoints._saver.wait_until_finished

    def full(*_, **__):
        finished()
        raise ValueError("RESOURCE_EXHAUSTED: [28] No space left on device [OS error 28: ENOSPC]\nand ten lines more")

    with monkeypatch.context() as broken:
        if where == "manifest":
            broken.setattr(steps, "write_manifests", full)
        else:  # Orbax itself asks for this before each save
            broken.setattr(checkpoints._saver, "save", lambda *_, **__: None)
            broken.setattr(checkpoints._saver, "wait_until_finished", full)
        checkpoints.save(3, models(3), training(3), META)
        checkpoints._committing.join()
    with pytest.raises(Stopped, match="3 could not be saved: No space left on device\nstep 2 is whole"):
        next(stream)
    assert sorted(os.listdir(copied)) == ["1", "2"]  # nothing is left that keeps the disk full
    checkpoints.save(3, models(3), training(3), META)  # there is room again
    checkpoints.close()
    assert newest(copied)[0] == 3


SAVING = """
import sys
import jax
import jax.numpy as jnp
from rlhfjax.errors import RlhfjaxError
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.digests import leaf_digests
from rlhfjax.training.state import abstract

size = int(sys.argv[2])
state = lambda step: ({"policy": {"a": jax.random.normal(jax.random.key(step), size)}}, (jnp.int32(step),))
try:
    checkpoints = Checkpoints(sys.argv[1], keep=2, report=print)
    restored = checkpoints.restore_newest(*map(abstract, state(0)))
    first = restored[2]["step"] + 1 if restored else 1
    assert first == 1 or leaf_digests(restored[0]) == leaf_digests(state(first - 1)[0])
    print("from", first, flush=True)
    for step in checkpoints.watched(range(first, 5)):
        checkpoints.save(step, *state(step), {"format": 2})
    checkpoints.close()
except RlhfjaxError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def saving(directory, **variables):
    words = [sys.executable, "-c", SAVING, str(directory), "1000"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("point", ["commit", pytest.param("save", marks=pytest.mark.faults)])
def test_killed_in_a_save_or_before_the_manifest(tmp_path, point):
    # fails when Orbax writes to the step's own name: seen
    fault = {"RLHFJAX_FAULT": f"sigkill@{point}:3", "RLHFJAX_ALLOW_FAULTS": "1"}
    done = saving(tmp_path, **fault)
    assert (done.returncode, done.stdout) == (-9, "from 1\n"), done.stderr
    left = sorted(os.listdir(tmp_path))
    assert left[:2] == ["1", "2"]
    assert [name for name in left if name.startswith("3.part")]
    done = saving(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "from 3"
    assert "3: was not finished when the process that saved it ended; removed" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=64m none "$1"; shift
head -c 26M /dev/zero > "$DISK/other"
"$@" && exit 99 || [ $? = 42 ]
ls "$DISK/run"
rm "$DISK/other"
"$@"
ls "$DISK/run"
"""


@pytest.mark.faults
@pytest.mark.parametrize("seen_before", [True, False], ids=["before", "during"])
def test_a_full_disk_stops_with_42_and_room_is_all_that_it_takes(tmp_path, seen_before):
    """64 MB, 26 of them taken by others, and 15 MB per step. `during`: the check before a save is told of more room."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs `unshare -m`, which this user may not")
    blind = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 10**12)\n"
    script = SAVING if seen_before else blind + SAVING
    program = [sys.executable, "-c", script, str(tmp_path / "run"), "4000000"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", IN_A_SMALL_DISK, "sh", str(tmp_path), *program],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "DISK": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    first, _, second = done.stdout.partition("run the same command again\n")
    reason = "MB are free" if seen_before else "could not be saved: No space left on device"
    assert reason in first
    assert "step 2 is whole; make room" in first
    assert second.split() == ["1", "2", "from", "3", "3", "4"]  # what was there when it stopped, and at the end
