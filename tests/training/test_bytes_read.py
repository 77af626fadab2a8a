"""What reading a model takes from the disk, as the system counts it: that model, and of it what a process holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from tiny import params_of, scalar_params_of

from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.training.checkpoint import Checkpoints, meta_of

WORKER = Path(__file__).with_name("reading_alone.py")
SIZES = {"vocab_size": 2048, "layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "mlp_width": 1024, "context": 64}


@pytest.fixture(scope="module")
def step_dir(tmp_path_factory):
    """A policy of 16 MB, another model, and moments of both, saved on one device."""
    model, folder = LanguageModel(decoder_config("llama", **SIZES)), tmp_path_factory.mktemp("ppo")
    models = {"policy": params_of(model), "value": scalar_params_of(model)}
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, models, ({"mu": models, "nu": models}, jnp.int32(1)), meta_of("policy", model, None))
    checkpoints.close()
    return folder / "1"


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_reads_what_it_holds_of_the_model_that_it_loads(step_dir, count):
    # fails when files are hashed first, and where chunks go across what another mesh cuts: seen
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, step_dir, coordinator, str(count), str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    told = [worker.communicate() for worker in workers]
    for worker, (out, err) in zip(workers, told, strict=True):
        assert worker.returncode == 0, err
        counted = json.loads(out.splitlines()[-1])
        assert counted["held"] > 16e6 / count
        assert counted["read"] <= 1.1 * counted["held"]
