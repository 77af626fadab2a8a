"""What a process of PPO reads of the models that it begins with, as the system counts it: what its devices hold."""

import re
import shutil
import socket
import subprocess
import sys
from collections import Counter

import pytest

from stages.conftest import saved
from stages.tiny_recipe import write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("strace"), reason="the system's calls are listed by strace"),
]
SIZES = {"layers": 4, "width": 256, "heads": 4, "mlp_width": 1024}
BEFORE = ("tokenizer", "pretrain", "sft", "reward")
_CALL = re.compile(r"(\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<call>\w+)\()(?P<rest>.*)")


def read_of(trace, run_dir):
    """Bytes that a process and its threads read of checkpoints, by stage; what is mapped counts as a whole."""
    found, paused = Counter(), {}
    for line in trace.read_text(errors="replace").splitlines():
        if not (call := _CALL.match(line)):
            continue
        thread, rest = call[1], call["rest"]
        path = re.search(rf"<{re.escape(str(run_dir))}/(\w+)/checkpoints/[^>]*>", rest)
        stage = paused.pop(thread, None) if call["resumed"] else path and path[1]
        if rest.endswith("<unfinished ...>"):
            paused[thread] = stage
        elif stage and (done := re.search(r"= (\d+)$", rest)):
            assert "mmap" not in (call["call"], call["resumed"])
            found[stage] += int(done[1])
    return found


@pytest.fixture(scope="module")
def before(files, command, tmp_path_factory):
    """A run up to PPO with models that are large beside what describes them: its directory, and the words to go on."""
    folder = tmp_path_factory.mktemp("before")
    words = ["run", write_recipe(folder / "larger.yaml", files), "stages.ppo.steps=1"]
    words += [f"model.{name}={size}" for name, size in SIZES.items()]
    words += [f"stages.{stage}.{key}=1" for stage in BEFORE[1:] for key in ("steps", "validate_every")]
    for stage in BEFORE:
        code, _, err = command(*words, "--run-dir", folder / "run", "--only", stage)
        assert code == 0, err
    return folder / "run", words


@pytest.mark.parametrize("count", [1, 4])
def test_ppo_reads_what_its_devices_hold(count, before, environment, tmp_path):
    done, words = before
    run_dir = tmp_path / "run"
    shutil.copytree(done, run_dir)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        to = ["--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--num-processes", str(count), "--process-id"]
    processes = [
        subprocess.Popen(
            [
                *("strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-o", tmp_path / f"{index}.trace"),
                *("-e", "trace=read,pread64,readv,preadv,preadv2,mmap", sys.executable, "-m", "rlhfjax.cli"),
                *(*map(str, words), f"mesh.fsdp={count}", "mesh.data=1", "--run-dir", run_dir, "--only", "ppo"),
                *((*to, str(index)) if count > 1 else ()),
            ],
            env=environment | {"JAX_NUM_CPU_DEVICES": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    read = [read_of(tmp_path / f"{index}.trace", run_dir) for index in range(count)]
    for stage, item in (("sft", "policy"), ("reward", "average")):
        step_dir = max((run_dir / stage / "checkpoints").iterdir(), key=lambda path: int(path.name))
        size = sum(array.nbytes for name, array in saved(step_dir).items() if name.startswith(f"{item}["))
        assert size > 10e6
        for each in read:
            assert 0.9 * size / count < each[stage] <= 1.1 * size / count
    assert {stage for each in read for stage in each} <= {"sft", "reward", "ppo"}
