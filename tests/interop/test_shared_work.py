"""Two processes of four devices each export a model that lies on all of them, and import it again."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from interop.exporting_process import SETTINGS, params
from rlhfjax.integrity import MANIFEST, check
from rlhfjax.interop.verify_export import check as check_export
from rlhfjax.training.checkpoint import load_model
from rlhfjax.transfer import export_checkpoint

FIGURES = ("max_abs_logit", "max_abs_logit_difference", "tolerance", "certificate")
WORKER = Path(__file__).with_name("exporting_process.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shared")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
    environment.pop("XLA_FLAGS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, coordinator, str(index), made], env=environment, stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    ended = [process.communicate(timeout=1800) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    return made


def test_an_export_of_several_processes_is_that_of_one_byte_for_byte(folder):
    export_checkpoint(str(folder / "sft"), folder / "one" / "made", **SETTINGS)
    one, two = ({path.name: path.read_bytes() for path in (folder / n / "made").iterdir()} for n in ("one", "two"))
    assert sum(name.endswith(".safetensors") for name in one) > 3
    # What was computed in the proof has other last digits where XLA shares sums among other threads.
    held, others = (json.loads(files.pop("parity.json")) for files in (one, two))
    for certificate, files in ((held, one), (others, two)):
        assert files.pop(MANIFEST)
        for name in [name for name in certificate if name in FIGURES]:
            assert certificate.pop(name)
    assert one == two
    assert held == others
    assert check_export(folder / "two" / "made")[0] == []
    assert check(folder / "two" / "made").differences == ()


def test_an_import_of_several_processes_is_what_was_exported(folder):
    _, got = load_model(folder / "imported" / "checkpoints" / "0")
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params())
    jax.tree.map(np.testing.assert_array_equal, got, rounded)
    assert check(folder / "imported" / "checkpoints" / "0").differences == ()
