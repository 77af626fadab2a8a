"""A host that is fit for a run is told from one that is not, by real processes that meet over the loopback."""

import json
import socket
import subprocess
import sys

import pytest
from stages.tiny_recipe import recipe

from rlhfjax.host import health
from rlhfjax.host.health import FAIL, OK, WARN, Finding
from rlhfjax.runs.doctor import across, clocks, merged


@pytest.fixture
def together(start):
    """Runs `doctor` as these of so many processes: exit codes and texts."""

    def ran(indices, count, *words, variables=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        place = ["--coordinator", address, "--num-processes", count]
        begun = [
            start("doctor", *words, *place, "--process-id", index, variables=dict(variables).get(index, {}))
            for index in indices
        ]
        said = [process.communicate() for process in begun]
        return [process.returncode for process in begun], said

    return ran


def test_two_processes_have_one_table(together, config, tmp_path):
    codes, said = together((0, 1), 2, config, "mesh.data=2", "--run-dir", tmp_path / "run")
    assert codes == [0, 0], said
    lines = {line[5:].partition(":")[0]: line for line in said[0][0].splitlines()}
    assert {line[:4] for line in lines.values()} <= {"ok  ", "warn"}
    assert lines.keys() >= {"devices", "run directory", "/dev/shm", "open files", "data", "alike", "clock", "mesh"}
    assert "2 processes on 1 hosts" in lines["alike"]
    assert "fits 2 devices" in lines["mesh"]
    assert said[1][0] == ""
    assert not (tmp_path / "run").exists()  # nothing is changed


def test_who_does_not_come_is_named(together):
    codes, said = together((0, 2), 4, "--wait", 8)
    assert codes == [42, 42]
    for _, err in said:
        assert "expected 4 processes within 8 s, got 2, without process 1, 3 (came: 0 on " in err
        assert ", 2 on " in err


def test_one_with_another_version_is_named(together, tmp_path):
    other = tmp_path / "flax-0.0.1.dist-info"  # which a process that has this folder in its path finds first
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.0.1\n")
    codes, said = together((0, 1), 2, variables={1: {"PYTHONPATH": str(tmp_path)}})
    assert codes == [2, 2]
    [failed] = [line for line in said[0][0].splitlines() if line.startswith(FAIL)]
    assert ", 0.0.1 in process 1 (install the same everywhere)" in failed


def test_what_is_wrong_with_the_data_and_the_mesh(command, files, tmp_path):
    whole = recipe(files)
    whole["stages"]["sft"]["data"][0]["source"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "wrong.yaml").write_text(json.dumps(whole), encoding="utf-8")
    code, out, _ = command("doctor", tmp_path / "wrong.yaml", "mesh.data=3")
    assert code == 3  # and 2: the mesh
    failed = [line for line in out.splitlines() if line.startswith(FAIL)]
    assert [line.split(":")[0].split()[1] for line in failed] == ["data", "mesh"]
    assert f"{tmp_path / 'gone.jsonl'} is not there" in failed[0]


def test_other_versions_are_named_with_who_has_them():
    same = {"version of jax": "0.10.2", "code": "abc", "host": "a", "devices": "4"}
    assert [each.level for each in across({0: same, 1: same | {"host": "b", "devices": "8"}})] == [OK]
    [found] = across({0: same, 1: same, 2: same | {"version of jax": "0.9.0"}})
    assert (found.level, found.code) == (FAIL, 2)
    assert found.text.startswith("version of jax is 0.10.2 in process 0, 0.9.0 in process 2 (")


def test_what_is_well_is_one_line_and_what_is_not_one_for_each():
    well, full = Finding(OK, "disk", "9 GB"), Finding(FAIL, "disk", "full")
    table = merged({0: [well], 1: [full], 2: [well], 3: [full], 4: [Finding(WARN, "disk", "slow")]})
    assert [(each.level, each.text) for each in table] == [
        (FAIL, "process 1, 3: full"),
        (WARN, "process 4: slow"),
    ]


def test_what_is_wrong_on_one_host_is_not_hidden_by_what_is_well_of_the_same_name():
    lacks, others = Finding(FAIL, "data", "x.jsonl is not there", 3), Finding(OK, "data", "2 files")
    assert merged({0: [others], 1: [lacks, others]}) == [Finding(FAIL, "data", "process 1: x.jsonl is not there", 3)]


def test_clocks():
    assert clocks({0: 0.0, 1: 0.02, 2: -0.3}) == Finding(OK, "clock", "at most 0.30 s apart")
    assert clocks({0: 0.0, 1: 5.0}).level == WARN


def test_a_full_disk():
    # a file system of 128 kB, in a mount namespace of the child's own
    program = "from pathlib import Path; from rlhfjax.host import health; print(*health.disk('d', Path('/mnt')))"
    fill = "mount -t tmpfs -o size=128k none /mnt && head -c 127k /dev/zero > /mnt/x"
    script = f'{fill}; "{sys.executable}" -c "{program}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("needs a mount namespace")
    assert "FAIL" in done.stdout
    assert "No space left on device" in done.stdout


def test_what_does_not_answer_is_given_up():
    import threading

    [found] = health.within(0.05, "devices", lambda: threading.Event().wait() or [], "look at the driver")
    assert found == Finding(FAIL, "devices", "no answer in 0 s (look at the driver)")
