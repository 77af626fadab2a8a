"""Two processes of four devices save local steps and are killed; a host is lost, a bit flips, files are others'."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.local_together import DURABLE, LAST

WORKER = Path(__file__).with_name("local_together.py")
PATIENCE = 1800  # seconds, of a busy machine

pytestmark = pytest.mark.faults


def start(*folders):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([sys.executable, WORKER, coordinator, str(index), *folders], env=environment, **pipes)
        for index in range(2)
    ]


def flip(path):
    """Change a bit of the first region, which is of the process's own."""
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What two processes restored of what was left of two that were killed, by what befell it."""
    root = tmp_path_factory.mktemp("local")
    saved = root / "saved"
    (saved / "stage").mkdir(parents=True)
    workers, until = start(saved), time.monotonic() + PATIENCE
    while not all((saved / f"ready{index}").exists() for index in range(2)) and time.monotonic() < until:
        if any(worker.poll() is not None for worker in workers):
            break
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
    said = [worker.communicate()[0] for worker in workers]
    assert all((saved / f"ready{index}").exists() for index in range(2)), said

    def files(folder, index):
        return sorted((folder / f"disk{index}").glob(f"*/p{index}/*.shards"))

    def swap(folder):
        for one, other in ((0, "aside"), (1, 0), ("aside", 1)):
            os.rename(folder / f"disk{one}", folder / f"disk{other}")

    def flip_own(folder):
        flip(files(folder, 1)[-1])

    def tear(folder):
        newest = files(folder, 1)[-1]
        newest.write_bytes(newest.read_bytes()[:-9])
        shutil.rmtree(folder / "disk0")

    def other_token(folder):
        (folder / "stage" / "local.json").unlink()

    def cut_rows(folder):
        (folder / "stage" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    befallen = {
        "nothing": lambda folder: None,
        "a host is another": lambda folder: shutil.rmtree(folder / "disk0"),
        "hosts changed places": swap,
        "a bit flipped": flip_own,
        "torn here, gone there": tear,
        "both hosts are others": lambda folder: [shutil.rmtree(folder / f"disk{index}") for index in range(2)],
        "another attempt": other_token,
        "rows are missing": cut_rows,
    }
    for name, happen in befallen.items():
        shutil.copytree(saved, root / name)
        happen(root / name)
    workers = start(*(root / name for name in befallen))
    said = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    return {
        name: [json.loads((root / name / f"restored{index}.json").read_text()) for index in range(2)]
        for name in befallen
    }


@pytest.mark.parametrize("befell", ["nothing", "a host is another", "hosts changed places", "a bit flipped"])
def test_the_newest_local_step_is_restored_to_the_bit(cases, befell):
    for told in cases[befell]:
        assert (told["step"], told["local"], told["same"], told["guards"]) == (LAST, True, True, LAST)
    said = "\n".join(cases[befell][0]["said"])
    assert f"goes on from the local step {LAST} in " in said
    assert f"the newest checkpoint is step {DURABLE}" in said
    assert ("other bits" in said or "as it was written" in said) == (befell == "a bit flipped")


def test_a_torn_file_leaves_the_step_before(cases):
    for told in cases["torn here, gone there"]:
        assert (told["step"], told["local"], told["same"]) == (LAST - 1, True, True)
    assert (
        "6.shards: expected a local step, got another end than such files have"
        in cases["torn here, gone there"][0]["said"][0]
    )


@pytest.mark.parametrize("befell", ["both hosts are others", "another attempt", "rows are missing"])
def test_the_checkpoint_is_restored_where_no_local_step_counts(cases, befell):
    for told in cases[befell]:
        assert (told["step"], told["local"], told["same"]) == (DURABLE, False, True)
