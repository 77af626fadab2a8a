"""How processes find each other, and what is said when they do not; nothing here starts a second jax."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rlhfjax.errors import ConfigError, Stopped
from rlhfjax.host import processes, rendezvous
from rlhfjax.host.processes import difference, in_cluster, lost_another, place_of
from rlhfjax.host.rendezvous import Place, meet

VARIABLES = {"RLHFJAX_COORDINATOR": "host:99", "RLHFJAX_NUM_PROCESSES": "4", "RLHFJAX_PROCESS_ID": "3"}


def test_flags_come_before_variables():
    assert place_of("a.b:1", 2, 1, VARIABLES) == Place("a.b:1", 2, 1, "a.b:1")
    assert place_of(None, None, None, VARIABLES) == Place("host:99", 4, 3, "host:99")
    assert place_of("a:1", 2, 0, {"JAX_COORDINATOR_BIND_ADDRESS": "[::]:1"}).bind == "[::]:1"
    assert place_of(None, None, None, {}) is None


@pytest.mark.parametrize(
    ("flags", "changed", "expected"),
    [
        (("a:1", 2, None), {}, "--process-id: expected it together with --coordinator and --num-processes"),
        ((None, None, 0), {}, "--coordinator: expected it together with --num-processes and --process-id"),
        (("a", 2, 0), {}, "--coordinator: expected HOST:PORT, got 'a'"),
        (("a:b", 2, 0), {}, "--coordinator: expected HOST:PORT, got 'a:b'"),
        (("a:1", 2, 2), {}, "--process-id: expected a number below 2 (--num-processes), got 2"),
        ((None,) * 3, {"RLHFJAX_PROCESS_ID": "x"}, "RLHFJAX_PROCESS_ID: expected a whole number, got 'x'"),
        ((None,) * 3, {"RLHFJAX_NUM_PROCESSES": "3"}, "RLHFJAX_PROCESS_ID: expected a number below 3"),
    ],
)
def test_what_makes_no_sense_is_named(flags, changed, expected):
    with pytest.raises(ConfigError) as caught:
        place_of(*flags, VARIABLES | changed)
    assert str(caught.value).startswith(expected)


SRUN = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"HOME": "/root", "http_proxy": "http://proxy"}, False),
        (SRUN, True),
        (SRUN | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # the shell of an allocation
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # any pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_where_jax_is_asked_for_the_others(environment, expected):
    assert in_cluster(environment) is expected


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def met():
    """Lets processes (index, count, seconds they are late) meet, in threads; what each ended with, and the seconds."""

    def run(*asked, timeout=1.5):
        address, ends = f"127.0.0.1:{free_port()}", {}

        def process(number, index, count, late):
            time.sleep(late)
            try:
                meet(Place(address, count, index, address), timeout)
                ends[number] = None
            except (ConfigError, Stopped) as error:
                ends[number] = error

        threads = [threading.Thread(target=process, args=(number, *each)) for number, each in enumerate(asked)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return [ends[number] for number in range(len(asked))]

    return run


def test_all_come(met):
    assert met((1, 3, 0), (0, 3, 0.2), (2, 3, 0.4), timeout=30) == [None] * 3


def test_one_is_missing(met):
    first, second = met((0, 4, 0), (2, 4, 0))
    assert [type(first), type(second)] == [Stopped, Stopped]  # nothing is lost; the same command again
    assert "expected 4 processes within 2 s, got 2, without process 1, 3;" in str(first)
    assert "process 2: expected process 0 and 4 processes in all at 127.0.0.1" in str(second)


def test_one_comes_too_late(met):
    first, second = met((0, 2, 0), (1, 2, 2.5))
    assert isinstance(first, Stopped)
    assert isinstance(second, Stopped)
    assert "got no answer" in str(second)


@pytest.mark.parametrize("asked", [((0, 3, 0), (1, 2, 0.3)), ((0, 3, 0), (2, 3, 0), (2, 3, 0.3))])
def test_numbers_that_do_not_fit_are_refused_everywhere(met, asked):
    ends = met(*asked, timeout=20)
    assert all(isinstance(end, ConfigError) for end in ends)
    assert len({str(end) for end in ends}) == 1
    expected = "--num-processes: expected 3, as process 0 has it, got 2 in process 1"
    assert str(ends[0]).startswith(
        expected if len(asked) == 2 else "--process-id: expected 0 to 2, each once, got 2 tw"
    )


def test_the_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(
            ConfigError, match=rf"--coordinator {address}: expected a free port .*Address already in use"
        ):
            meet(Place(address, 2, 0, address), 5)


def test_somebody_else_answers():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Stopped, match="got no answer"):
            meet(Place(address, 2, 1, address), 0.5)


def test_strangers_at_the_door_are_sent_away(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    ended = []
    thread = threading.Thread(target=lambda: ended.append(meet(Place(address, 2, 0, address), 30)))
    thread.start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"greeting": 1}\n', b"[]\n", b"\xff" * 9000 + b"\n"):
        for _ in range(200):
            try:
                with socket.create_connection(rendezvous._address(address), timeout=5) as door:
                    door.sendall(text)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
    meet(Place(address, 2, 1, address), 30)
    thread.join(30)
    assert ended == [None]


def test_what_processes_do_not_agree_on_is_named():
    same = {"code": "a", "configuration seed": "1"}
    assert difference({0: same, 1: same, 2: dict(same)}) is None
    other = difference({0: same, 1: same | {"configuration seed": "2"}, 2: same, 3: same | {"configuration seed": "2"}})
    assert other.startswith(
        "processes do not agree on configuration seed: expected 1, as process 0 has it, got 2 in process 1, 3."
    )
    assert "agree on extra: expected nothing, as process 0 has it, got x in process 1" in difference(
        {0: same, 1: same | {"extra": "x"}}
    )
    assert "agree on code: expected a, as process 0 has it, got nothing in process 1" in difference(
        {0: same, 1: {"configuration seed": "1"}}
    )


def test_a_collective_that_failed_with_another_process_is_told_from_a_bug():
    assert lost_another(ValueError("wrong")) is None
    later = Stopped("checkpoint could not be saved")
    later.__cause__ = RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore")
    assert lost_another(later) == "UNKNOWN: Gloo AllGather failed: Connection reset by peer"


def test_alone_there_is_nothing_to_wait_for():
    done = []
    processes.barrier("x")
    processes.agree({"code": "a"})
    processes.by_first(lambda: done.append(1), "x")
    assert (done, processes.is_first(), processes.count(), processes.preempted()) == ([1], True, 1, False)
    np.testing.assert_array_equal(processes.fetch({"x": np.arange(3)})["x"], np.arange(3))


def test_a_run_by_itself_asks_nobody(tmp_path):
    # no flag, no variable, no cluster: jax is not even imported to find out
    script = (
        "import sys, socket\n"
        "socket.socket.connect = lambda *_: sys.exit('network')\n"
        "from types import SimpleNamespace\n"
        "from rlhfjax.cli.launching import among_processes\n"
        "with among_processes(SimpleNamespace(), None, None, None):\n"
        "    assert 'jax' not in sys.modules\n"
    )
    bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    subprocess.run([sys.executable, "-c", script], check=True, env=bare, cwd=tmp_path)
