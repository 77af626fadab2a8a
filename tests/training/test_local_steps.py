"""Local steps of one process: their files, what is taken of them, and what is not. Two: test_local_together.py."""

import itertools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax.config import load_config
from rlhfjax.errors import ConfigError
from rlhfjax.launch.process_group import progress
from rlhfjax.sharding import make_mesh
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.digests import leaf_digests
from rlhfjax.training.local import LocalSteps, require_local_dir, restored_newest, steps
from rlhfjax.training.local.hosts import shift_of
from rlhfjax.training.local.layout import layout_of, leaves_of
from rlhfjax.training.local.moving import moved
from rlhfjax.training.state import abstract


def state_of(step, shape=(1, 4, 1, 2)):
    """A model whose two items share an array, and what is trained with it."""
    mesh = make_mesh(*shape)

    def put(value, *axes):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))

    draw = np.random.default_rng(step)
    shared = put(draw.normal(size=(8, 6)).astype(np.float32), "fsdp", "tensor")
    models = {"policy": {"a": shared, "b": put(jnp.bfloat16(draw.normal(size=(3, 4))), None, "tensor")}}
    models["value"] = {"a": shared}
    return models, (put(draw.normal(size=8).astype(np.float32), ("fsdp", "tensor")), put(np.int32(step)))


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.sharding == b.sharding and np.array_equal(a, b) for a, b in pairs)


class Stage:
    """A stage in a folder, by which a process that starts again finds what the one before left."""

    def __init__(self, folder):
        self.folder, self.said = folder, []
        self.disk, self.rows = folder / "disk", folder / "stage" / "metrics.jsonl"
        self.local = LocalSteps(self.disk, 1, folder / "stage", "tiny", self.said.append)

    def save(self, step, **state):
        with self.rows.open("a") as rows:
            rows.write(json.dumps({"step": step}) + "\n")
        self.local.save(step, *state_of(step, **state), {"guards": step})
        self.local.close()

    def files(self):
        return sorted(self.disk.glob("*/p0/*.shards"))

    def restored(self, **state):
        """Step and guards of what a start finds, None where it finds nothing; it is what was saved to the bit."""
        again = Stage(self.folder)
        self.said = again.said
        checkpoints = Checkpoints(self.folder / "stage" / "checkpoints", keep=2, report=again.said.append)
        models, training = state_of(0, **state)
        restored, local = restored_newest(checkpoints, again.local, self.rows, abstract(models), abstract(training))
        checkpoints.close()
        if restored is None:
            return None
        assert local
        assert same(restored[:2], state_of(restored[2]["step"], **state))
        return restored[2]["step"], restored[2]["guards"]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_two_steps_are_kept_and_the_newest_is_restored_to_the_bit(stage):
    for step in (1, 2, 3):
        stage.save(step)
        assert len(stage.files()) == min(step, 2)
    assert [path.stem for path in stage.files()] == ["2", "3"]
    assert stage.restored() == (3, 3)
    [said] = stage.said
    assert said.startswith("goes on from the local step 3 in ")
    stage.local.finish()
    assert [list(stage.disk.iterdir()), list(stage.rows.parent.glob("local.json"))] == [[], []]


def test_a_file_has_each_region_once_and_the_digests_of_the_devices(stage):
    stage.save(1)
    models, training = state_of(1)
    data = stage.files()[0].read_bytes()
    index = json.loads(data[-48 - int.from_bytes(data[-48:-40], "little") : -48])
    leaves = (models["policy"], training)  # the value model's array is the policy's
    stored = sum(int(np.prod(shape)) for _, _, shape, _, _ in index["blocks"])
    assert stored == sum(leaf.size for leaf in jax.tree.leaves(leaves))
    assert index["digests"] == leaf_digests({**models, "training": training})
    assert oct(stage.files()[0].stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone"])
def test_what_is_damaged_is_said_and_the_step_before_taken(stage, damage):
    for step in (1, 2, 3):
        stage.save(step)
    newest, data = stage.files()[-1], bytearray(stage.files()[-1].read_bytes())
    data[7] ^= 16
    if damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes(data if damage == "flipped" else data[:-1])
    assert stage.restored() == (2, 2)
    if damage != "gone":
        assert str(newest) in stage.said[0]
    assert [path.stem for path in stage.files()] == ["2"]  # a later one that is bad must not come back


def test_files_from_before_a_rollback_never_count_again(stage, tmp_path):
    stage.save(1)
    stage.save(2)
    kept = {path: path.read_bytes() for path in stage.files()}
    stage.local.forget()
    assert stage.files() == []
    for path, data in kept.items():  # the disk of a host that was away
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert stage.restored() is None


def test_another_mesh_and_missing_rows_are_said(stage):
    stage.save(5)
    assert stage.restored(shape=(2, 2, 1, 2)) is None
    then, now = (f"processes 1, devices 8, mesh {mesh} x tensor 2" for mesh in ("fsdp 4", "data 2 x fsdp 2"))
    assert stage.said == [f"{stage.local.root}: step 5 is of {then}; here are {now}"]
    stage.save(5)
    stage.rows.write_text('{"step": 4}\n{"step": 5')
    assert stage.restored() is None
    assert f"step 5 is left out, since {stage.rows} ends at step 4" in stage.said[0]


def test_training_does_not_wait_for_a_slow_disk(stage, monkeypatch):
    write, go, at_work = steps.write, threading.Event(), threading.Event()

    def slowly(*arguments):
        at_work.set()
        assert go.wait(60)
        write(*arguments)

    monkeypatch.setattr(steps, "write", slowly)
    models, training = state_of(1)
    stage.local.save(1, models, training, {"guards": 1})
    assert at_work.wait(60)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - x, tree), donate_argnums=0)
    jax.block_until_ready(overwrite((models["policy"], training)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(models["policy"]))  # nobody holds what was given away
    stage.local.save(2, *state_of(2), {"guards": 2})  # left out
    go.set()
    stage.local.close()
    stage.save(3)
    assert [path.stem for path in stage.files()] == ["1", "3"]
    stage.files()[-1].unlink()
    assert stage.restored() == (1, 1)


def test_a_step_that_cannot_be_written_is_said_once(stage):
    stage.save(1)
    stage.local.root.rename(stage.disk / "aside")
    stage.local.root.write_text("in the way")
    stage.save(2)
    stage.save(3)
    stage.save(4)
    stage.local.root.unlink()
    (stage.disk / "aside").rename(stage.local.root)
    stage.save(5)
    [said] = stage.said
    assert "step 2 could not be written by process 0: " in said
    assert [path.stem for path in stage.files()] == ["1", "5"]
    assert stage.restored() == (5, 5)


def test_regions_travel_along_the_line():
    layout = layout_of(leaves_of(state_of(1)[0]))
    row = np.arange(8 * 2 * 3, dtype=np.int32).reshape(16, 3)
    parts = [jax.device_put(row[2 * i : 2 * i + 2], device) for i, device in enumerate(layout.devices)]
    pairs = tuple((i, (i + 4) % 8) for i in range(8))
    [received] = moved(layout.line, pairs, [parts])
    np.testing.assert_array_equal(np.concatenate(received), np.roll(row, 8, axis=0))
    assert [part.devices() for part in received] == [{device} for device in layout.devices]


def test_a_copy_is_on_another_host_where_there_is_one():
    assert [shift_of(hosts) for hosts in ("a", "ab", "aa", "aabb", "aaabbbccc", "abab")] == [0, 1, 1, 2, 3, 1]
    for hosts in itertools.product("abc", repeat=4):
        shift = shift_of(hosts)
        apart = [s for s in range(1, 4) if all(hosts[i] != hosts[(i + s) % 4] for i in range(4))]
        assert shift == min(apart, default=1)


def test_a_directory_that_will_not_do_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"checkpoints\.local\.dir: expected a directory that .* can write to, got"):
        require_local_dir(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="expected a directory on a disk of each host, got 's3://bucket/x'"):
        load_config("quickstart", ["checkpoints.local.dir=s3://bucket/x"])


def test_a_launcher_takes_local_steps_for_progress(tmp_path):
    (tmp_path / "ppo" / "checkpoints" / "20").mkdir(parents=True)
    assert progress(tmp_path) == (0, 20)
    (tmp_path / "ppo" / "local.json").write_text('{"token": "a", "step": 35}')
    assert progress(tmp_path) == (0, 35)
