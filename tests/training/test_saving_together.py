"""Two processes of four devices each save arrays that both of them hold: no save waits for ever, and one reads all."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhfjax.sharding import make_mesh, put, replicated, state_shardings
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.checkpoint.steps import steps_in
from rlhfjax.training.state import abstract
from training.saving_together import models

WORKER = Path(__file__).with_name("saving_together.py")
SAVES, PATIENCE = 8, 1200  # seconds, of a busy machine; where it dead-locked, the first or second save did


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The checkpoints of two processes that were killed after the eighth save, while they saved the next one."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, coordinator, str(index), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    until = time.monotonic() + PATIENCE
    while max(steps_in(folder), default=0) < SAVES and time.monotonic() < until:
        if any(worker.poll() is not None for worker in workers):
            break
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
    said = [worker.communicate()[0] for worker in workers]
    assert max(steps_in(folder), default=0) >= SAVES, ("waited for the eighth save", steps_in(folder), *said)
    return folder


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 2)], ids=["one device", "2 x 2"])
def test_the_newest_whole_step_is_read_on_other_meshes(killed, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    like = jax.device_put(models(0), state_shardings(mesh, models(0)))
    checkpoints = Checkpoints(killed, keep=2, report=lambda text: None)
    restored = checkpoints.restore_newest(
        abstract(like), (abstract(like), abstract(put(np.int32(0), replicated(mesh))))
    )
    checkpoints.close()
    assert restored is not None
    params, (moments, count), meta = restored
    assert meta["step"] == count >= SAVES
    for found, wanted in ((params, models(int(count))), (moments, models(-int(count)))):
        for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(leaf, expected)
            assert leaf.sharding.mesh == mesh
