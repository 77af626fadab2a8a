"""SLURM on this machine, for a while: a controller and nodes of their own ports, all on the loopback.

It needs root and the daemons (`apt-get install slurmctld slurmd slurm-client munge`), and changes nothing of the
machine: names of nodes are known inside the daemons' own mount namespaces, keys, sockets and state lie in one folder. A
network namespace would not do: SLURM resolves names only where an interface other than the loopback is up.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
PATIENCE = 600  # seconds, of a busy machine
_CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
SlurmdTimeout=20
{nodes}
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What this machine lacks to run SLURM; nothing where it can."""
    lacking = [name for name in DAEMONS if shutil.which(name) is None]
    return [*lacking, "root"] if os.geteuid() else lacking


@dataclass
class Cluster:
    """The daemons, and what is asked of them."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        """Starts a daemon that knows the names of the nodes, in a mount namespace that ends with it."""
        inside = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["unshare", "--mount", "bash", "-c", inside, name, *command],
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", name)

    def lose(self, name: str) -> None:
        """The node's daemon and all that it runs are killed at once, as by a machine that loses its power."""
        mount = os.readlink(f"/proc/{self.daemons[name].pid}/ns/mnt")  # of nothing else
        for _ in range(2):  # what was started in between, too
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    if os.readlink(process / "ns/mnt") == mount:
                        os.kill(int(process.name), signal.SIGKILL)
        self.daemons.pop(name).wait()

    def ask(self, *command: str, check: bool = True, **options) -> str:
        """Runs a command of SLURM, and gives what it wrote."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.ask("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, *states: str) -> dict[str, str]:
        """The job, when it has come to one of these states and its processes are gone."""
        until = time.monotonic() + PATIENCE
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < until, f"job {number} is {job['JobState']}, not {' or '.join(states)}"
            time.sleep(0.3)
        return job


@contextmanager
def cluster(folder: Path, nodes: tuple[str, ...] = ("n1", "n2")) -> Iterator[Cluster]:
    """A cluster whose nodes have two CPUs each, ended when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(nodes))
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
        for name, port in zip(nodes, ports[1:], strict=True)
    ]
    conf, hosts = folder / "slurm.conf", folder / "hosts"
    conf.write_text(_CONF.format(host=host, ports=ports, folder=folder, nodes="\n".join(lines)))
    hosts.write_text(f"127.0.0.1 localhost {host} {' '.join(nodes)}\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    running = Cluster(folder, {**os.environ, "SLURM_CONF": str(conf)})
    files = [f"--{what}={folder}/munge.{what.partition('-')[0]}" for what in ("key-file", "pid-file", "seed-file")]
    try:
        running.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        _until(lambda: (folder / "munge.socket").exists(), "munged has no socket")
        running.start("slurmctld", "slurmctld", "-D", "-c", "-f", str(conf))
        for name in nodes:
            running.start_node(name)
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        _until(lambda: running.ask(*idle, check=False).strip() == f"{len(nodes)}", "nodes are down")
        yield running
    finally:
        _end(running.daemons)


def _end(daemons: dict[str, subprocess.Popen]) -> None:
    for name in reversed(daemons):
        daemons[name].terminate()
        try:
            daemons[name].wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemons[name].kill()
            daemons[name].wait()


def _until(true, otherwise: str) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until, otherwise
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Free now, and all different."""
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [door.getsockname()[1] for door in doors]
    for door in doors:
        door.close()
    return ports
