"""Compiled programs are kept, in a directory where only their owner writes."""

import os
import stat
import subprocess
import sys

import jax
import pytest

from rlhfjax.host import compile_cache
from rlhfjax.host.compile_cache import compile_cache_dir, use_compile_cache


@pytest.fixture
def no_cache():
    """A process whose jax keeps nothing; afterwards as it was."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def used(directory):
    """(whether it is used, what was reported)."""
    said = []
    return use_compile_cache(said.append, directory), said


def test_a_private_directory_is_made_and_used(no_cache, tmp_path):
    directory = tmp_path / "a" / "compiled"
    assert used(directory) == (True, [])
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert used(tmp_path / "another")[0]  # one is there already, as where JAX_COMPILATION_CACHE_DIR names it
    assert jax.config.jax_compilation_cache_dir == str(directory)


def test_the_directory_follows_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache_dir() == tmp_path / "rlhfjax" / "compiled"


def linked(path):
    path.with_name("elsewhere").mkdir()
    path.symlink_to(path.with_name("elsewhere"))


def opened(path):
    path.mkdir()
    path.chmod(0o770)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (opened, "others may write there (mode 770)"),
        (linked, "got a link or a file"),
        (lambda path: path.touch(), "File exists"),
    ],
)
def test_a_directory_that_others_could_fill_is_refused_in_one_line(no_cache, tmp_path, make, reason):
    make(tmp_path / "compiled")
    using, [line] = used(tmp_path / "compiled")
    assert not using
    assert reason in line
    assert "\n" not in line
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_of_somebody_else_is_refused(no_cache, tmp_path, monkeypatch):
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (tmp_path / "compiled").mkdir(mode=0o700)
    using, [line] = used(tmp_path / "compiled")
    assert not using
    assert f"belongs to user {owner}" in line


def test_switched_off_nothing_is_made(no_cache, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert used(tmp_path / "compiled") == (False, [])
    assert not (tmp_path / "compiled").exists()


def test_what_was_not_read_for_longest_goes_first(no_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "KEPT_BYTES", 25)
    for age, name in enumerate(["new-cache", "middle-cache", "old-cache"]):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "old-cache", (2e9, 1e9 - 2))  # read since
    tmp_path.chmod(0o700)
    assert used(tmp_path) == (True, [])
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "old-cache"}


PROGRAM = """
import jax, jax.numpy as jnp
from rlhfjax.host.compile_cache import use_compile_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.rsplit("/", 1)[1]))
use_compile_cache(print)
print(float(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.eye(3))), hits.count("cache_hits"), hits.count("cache_misses"))
"""


def test_a_second_process_reads_what_the_first_compiled_and_a_damaged_entry_only_warns(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run():
        command = [sys.executable, "-W", "default", "-c", PROGRAM]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        value, hits, misses = done.stdout.split()
        assert float(value) == pytest.approx(3 * 0.76159416)
        return int(hits), int(misses), done.stderr

    hits, misses, _ = run()
    assert hits == 0
    assert misses > 0
    assert run()[:2] == (misses, 0)  # fails when small programs are not worth keeping
    for path in (tmp_path / "rlhfjax" / "compiled").glob("*-cache"):
        path.write_bytes(path.read_bytes()[:40])
    hits, _, warned = run()
    assert hits == 0
    assert "Error reading persistent compilation cache" in warned
