"""Plays scenes: the launch file under what stands for SLURM, as often as it asks to be started again."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhfjax.config import Run, resolved_yaml
from rlhfjax.errors import ConfigError, Stopped
from rlhfjax.files import write_json, write_text
from rlhfjax.launch.needs import of_topology
from rlhfjax.launch.process_group import LAUNCHER
from rlhfjax.launch.rendering import Order, render
from rlhfjax.rehearsal import stand_in
from rlhfjax.rehearsal.scenes import Cast
from rlhfjax.xla_flags import refused, words_of

CONFIG, LAUNCH, DATA, PLAYED, RUN, FIRST = "config.yaml", "launch.sh", "data", "played", "run", "first"
_GRACE = 30  # seconds that nodes have to end when one has
_PORTS, _FIRST_PORT = 12000, 20000  # as the launch file counts them from the number of the job
_IMPORTS_S = 300.0
# What runs once or twice is compiled with less care, in a third of the time.
_QUICK = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
          "--xla_cpu_parallel_codegen_split_count=1")  # fmt: skip


@dataclass(frozen=True)
class Played:
    """What came of a scene: starts, the last exit code, what was said, and seconds in all.

    Where it was started once, also the seconds from the fault until the last of the processes that it did not hit had
    ended, and from the first of these to that.
    """

    starts: int
    code: int
    lines: list[str]
    seconds: float
    after_s: float | None
    left_s: float | None
    run_dir: Path


@dataclass
class Theatre:
    """A folder with the configuration, its data and the launch file, and the process that forks all others."""

    folder: Path
    nodes: int
    devices: int
    stage: str
    environment: dict[str, str] = field(default_factory=dict)
    end: Callable[[], None] = lambda: None  # ends all that play

    def play(
        self, name: str, cast: Cast | None = None, parent: Path | None = None, stopped: Path | None = None
    ) -> Played:
        """One scene; without a cast a run without faults.

        It goes on from the run `parent`, whose stage is played again, or from one that was `stopped` in that stage:
        then what the first start of a scene does has been done.
        """
        place = self.folder / PLAYED / name
        shutil.rmtree(place, ignore_errors=True)
        logs, run_dir = place / "logs", place / RUN
        logs.mkdir(parents=True)
        (place / DATA).symlink_to(self.folder / DATA)
        if from_where := stopped or parent:
            shutil.copytree(from_where, run_dir, ignore=None if stopped else self._without_stage(from_where))
        variables = self._variables(place, cast)
        began, starts, code = time.monotonic(), 0, 42
        requeued, first = place / "requeued", place / FIRST
        while starts == 0 or requeued.exists():
            requeued.unlink(missing_ok=True)
            if starts or stopped:
                if cast and cast.scene.keeps:
                    shutil.copytree(run_dir, first, dirs_exist_ok=True)
                self._damage(cast, run_dir)
            starts += 1 + (starts == 0 and stopped is not None)
            code = self._start(place, variables, starts - 1)
        seconds = time.monotonic() - began
        lines = [line for log in sorted(logs.glob("*.log")) for line in log.read_text("utf-8", "replace").splitlines()]
        after, left = _waited(place, logs, cast) if cast and starts == 1 else (None, None)
        return Played(starts, code, lines, seconds, after, left, run_dir)

    def _without_stage(self, run_dir: Path) -> Any:
        """The stage is played again; those before and after it are those of the run without faults."""
        return lambda folder, names: {self.stage} & set(names) if Path(folder) == run_dir else set()

    def _start(self, place: Path, variables: dict[str, str], attempt: int) -> int:
        """The launch file, once, as the number `attempt` of this job."""
        port = _free_port()
        job = {"SLURM_JOB_ID": str(port - _FIRST_PORT), "SLURM_RESTART_COUNT": str(attempt)}
        held = variables | job
        with (place / "job.log").open("ab") as log:
            words = ["bash", str(self.folder / LAUNCH)]
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            job_process = subprocess.Popen(words, cwd=place, env=held, start_new_session=True, **streams)
            try:
                return job_process.wait()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(job_process.pid, signal.SIGKILL)

    def _variables(self, place: Path, cast: Cast | None) -> dict[str, str]:
        scene: dict[str, Any] = {"process": 0, "verbs": [], "node": {}, "logs": str(place / "logs")}
        final = cast is not None and cast.scene.ends == "verdict"
        if cast is not None:
            verbs = ["run"] if cast.scene.verb == "run" else ["doctor", "run"]
            scene |= {"process": cast.process, "verbs": verbs, "node": self._node(cast, place)}
        write_json(place / "scene.json", scene)
        return self.environment | {
            "REHEARSAL_SCENE": str(place / "scene.json"),
            "REHEARSAL_REQUEUED": str(place / "requeued"),
            "SLURM_JOB_NODELIST": "loopback",
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "RLHFJAX_MOST_STOPS": "0" if final else "3",
            "RLHFJAX_MOST_DEATHS": "0" if final else "3",
        }

    def _node(self, cast: Cast, place: Path) -> dict[str, Any]:
        """What is otherwise on the node that is hit."""
        if cast.scene.fault:
            fault = {"RLHFJAX_FAULT": cast.filled(cast.scene.fault), "RLHFJAX_ALLOW_FAULTS": "1"}
            return {"variables": fault | {"RLHFJAX_FAULT_MARK": str(place / "mark")}}
        made = {"late": {"late": 5.0}, "absent": {"absent": True}}
        if cast.scene.node in made:
            return made[cast.scene.node]
        other = place / "node"
        if cast.scene.node == "data":
            shutil.copytree(self.folder / DATA, other / DATA)
            next((other / DATA).glob("document*")).unlink()
            return {"folder": str(other)}
        if cast.scene.node == "version":
            write_version(other, "jax", "0.0.1")
            return {"variables": {"PYTHONPATH": str(other)}}
        if cast.scene.node == "code":
            import rlhfjax

            package = Path(rlhfjax.__file__).parent
            shutil.copytree(package, other / "rlhfjax", ignore=shutil.ignore_patterns("__pycache__"))
            with (other / "rlhfjax" / "errors.py").open("a", encoding="utf-8") as file:
                file.write("\n# A node with other code.\n")
            return {"variables": {"PYTHONPATH": str(other), "REHEARSAL_FRESH": "1"}}
        astray = ["--coordinator", f"127.0.0.1:{_free_port()}", "--num-processes", str(self.nodes)]
        variables = {
            "astray": {"REHEARSAL_WORDS": json.dumps([*astray, "--process-id", str(cast.process)])},
            "configuration": {"REHEARSAL_WORDS": json.dumps(["seed=20261201"])},
            "twice": {"SLURM_PROCID": str(cast.process - 1)},
        }
        return {"variables": variables[cast.scene.node]}

    def _damage(self, cast: Cast | None, run_dir: Path) -> None:
        """Damage the newest step, where the scene has that."""
        if cast is None or not cast.scene.damage:
            return
        steps = [path for path in (run_dir / self.stage / "checkpoints").iterdir() if path.name.isdigit()]
        newest = max(steps, key=lambda path: int(path.name))
        largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        if cast.scene.damage == "torn":
            data = data[: len(data) // 2]
        else:
            data[len(data) // 2] ^= 1
        largest.write_bytes(data)


def _waited(place: Path, logs: Path, cast: Cast) -> tuple[float | None, float | None]:
    ends, mark = logs / "0.run.ends", place / "mark"
    if not ends.exists():
        return None, None
    told = json.loads(ends.read_text("ascii"))
    others = [at for node, at in told.items() if int(node) != cast.process] or list(told.values())
    after = max(others) - float(mark.read_text("ascii")) if mark.exists() else None
    return after, max(others) - min(others)


def write_version(folder: Path, package: str, version: str) -> None:
    """What makes Python find another version of a package there."""
    facts = folder / f"{package}-{version}.dist-info"
    facts.mkdir(parents=True)
    write_text(facts / "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def write_launch(folder: Path, run: Run, nodes: int, each: int) -> None:
    """The configuration, and the launch file for SLURM that `rlhfjax launch render` makes of it."""
    write_text(folder / CONFIG, resolved_yaml(run))
    needs = of_topology(f"cpu:{each}", nodes, 1)
    config = str(folder / CONFIG)
    command = f"rlhfjax launch render slurm {config} --nodes {nodes} --topology cpu:{each} --run-dir {RUN}"
    order = Order(run.name, config, (), RUN, replace(needs, grace_s=_GRACE), command)
    write_text(folder / LAUNCH, render("slurm", order))


@contextmanager
def opened(folder: Path, nodes: int, devices: int, stage: str) -> Iterator[Theatre]:
    """The theatre of a folder that `write_launch` has filled, with its stand-ins and the process that forks."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as short:  # a socket has a short name
        door, tools = Path(short) / "door", Path(short) / "bin"
        tools.mkdir()
        for name in ("srun", "scontrol", "rlhfjax"):
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{stand_in.__file__}" {name} "$@"\n')
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        given = words_of(os.environ.get("XLA_FLAGS", ""))
        quick = [word for word in _QUICK if word not in refused(_QUICK)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*quick, *given]),
            "REHEARSAL_SOCKET": str(door),
            "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        for name in [name for name in environment if name.startswith(("SLURM_", "RLHFJAX_FAULT"))]:
            del environment[name]
        with (folder / "forks.log").open("wb") as log:
            words = [sys.executable, "-m", "rlhfjax.rehearsal.forking", str(door)]
            # It ends with this process, and all that it forked with it.
            mine = environment | {LAUNCHER: str(os.getpid())}
            server = subprocess.Popen(words, env=mine, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _until_open(door, server, folder / "forks.log")
            yield Theatre(folder, nodes, devices, stage, environment, server.kill)
        finally:
            server.kill()
            server.wait()


def _until_open(door: Path, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + _IMPORTS_S
    while not door.exists():
        if server.poll() is not None or time.monotonic() > until:
            raise Stopped(f"the process that forks the others did not start: see {log}")
        time.sleep(0.05)


def _free_port() -> int:
    """A port that nobody has now, of those that the launch file may choose."""
    for offset in range(os.getpid() * 7 % _PORTS, 2 * _PORTS):
        port = _FIRST_PORT + (offset + time.monotonic_ns() // 1000) % _PORTS
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(f"expected a free port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS}, got none")
