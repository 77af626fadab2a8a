"""One finished run of the tiny recipe for all tests of all processes, and ways to run parts of it again."""

import fcntl
import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from forks import forked

from stages.tiny_recipe import STAGES, write_files, write_recipe


@pytest.fixture(scope="session")
def for_all(tmp_path_factory, request):
    """Makes a folder once for all processes that run tests: the first that asks makes it, the others wait."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # which the workers of pytest-xdist share

    def made(name, make):
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.made").exists():
                shutil.rmtree(root / name, ignore_errors=True)
                (root / name).mkdir()
                make(root / name)
                (root / f"{name}.made").touch()
        return root / name

    return made


@pytest.fixture(scope="session")
def files(for_all):
    """The recipe's files. Tests only read them, but for `prepared`, where more data may be prepared."""
    return for_all("recipe", lambda folder: write_recipe(write_files(folder) / "tiny.yaml", folder))


@pytest.fixture(scope="session")
def config(files):
    """The file of the tiny recipe."""
    return files / "tiny.yaml"


@pytest.fixture(scope="session")
def environment():
    """Of a process with one CPU device that shares the cache of compiled programs."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def start(environment):
    """Starts the command line in a process of its own, with variables, and a fault in it where one is named."""

    def started(*args, fault=None, variables=()):
        faults = {"RLHFJAX_FAULT": fault, "RLHFJAX_ALLOW_FAULTS": "1"} if fault else {}
        return forked(*args, environment=environment | faults | dict(variables))

    return started


@pytest.fixture(scope="session")
def command(start):
    """Runs the command line to its end: (exit code, stdout, stderr)."""

    def ran(*args, fault=None):
        process = start(*args, fault=fault)
        out, err = process.communicate()
        return process.returncode, out, err

    return ran


@pytest.fixture(scope="session")
def finished(config, command, for_all):
    """The directory of a run that went through without a break, on one device. Tests only read it."""

    def make(folder):
        code, _, err = command("run", config, "--run-dir", folder / "finished")
        assert code == 0, err

    return for_all("runs", make) / "finished"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run up to, and without, a stage."""

    def copy(stage):
        before = STAGES[: STAGES.index(stage)]
        shutil.copytree(finished, tmp_path / "run", ignore=lambda folder, names: _later(folder, names, before))
        return tmp_path / "run"

    def _later(folder, names, before):
        kept = {*before, "config.yaml", "manifest.jsonl"}
        return set(names) - kept if folder == str(finished) else set()

    return copy


def rows_of(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def saved(step_dir):
    """Everything that a checkpoint holds as numpy arrays, by item and path."""
    found = {}
    with ocp.PyTreeCheckpointer() as reader:
        for item in sorted(path for path in step_dir.iterdir() if (path / "_METADATA").exists()):
            shapes = reader.metadata(item.absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = reader.restore(item.absolute(), restore_args=as_numpy)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[item.name + jax.tree_util.keystr(path)] = leaf
    return found


def assert_same_bits(one, other):
    """Two results of `saved` are equal to the last bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    assert one
    assert different == []
