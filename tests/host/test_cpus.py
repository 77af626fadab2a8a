"""What CPUs need as the devices of several processes."""

import os
from types import SimpleNamespace

import jax
import pytest
from jax._src import compilation_cache, compiler, distributed

from rlhfjax.host import cpus


@pytest.mark.parametrize(("devices", "given", "wanted"), [(1, None, None), (40, None, 320), (4, "3", 3)])
def test_several_cpu_devices_of_a_process_have_threads_to_wait_in(monkeypatch, devices, given, wanted):
    monkeypatch.delenv("NPROC", raising=False)
    if given:
        monkeypatch.setenv("NPROC", given)
    cpus._use_threads(devices)
    found = os.environ.pop("NPROC", None)
    assert found == (None if wanted is None else str(wanted))


@pytest.mark.parametrize(("platform", "kept"), [("cpu", ["jit_step-1"]), ("tpu", [])])
def test_a_process_that_is_not_the_first_keeps_the_programs_of_its_cpu(monkeypatch, platform, kept):
    put = []
    monkeypatch.setattr(compiler, "_cache_write", compiler._cache_write)  # as it was, afterwards
    monkeypatch.setattr(compilation_cache, "put_executable_and_time", lambda key, *rest: put.append(key))
    monkeypatch.setattr(distributed.global_state, "process_id", 3)
    cpus._keep_programs_of_all()
    rest = [[]] if jax.version.__version_info__ < (0, 11) else []
    compiler._cache_write("jit_step-1", 9.0, "jit_step", SimpleNamespace(platform=platform), None, *rest)
    assert put == kept
