"""Whether this machine is fit for a run: devices, disks, memory and limits. Each check is one `Finding`.

Nothing here waits for another process. What may hang, such as a driver, is asked in a thread and given up.
"""

import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError, RlhfjaxError
from rlhfjax.host.environment import machine

OK, WARN, FAIL = "ok", "warn", "FAIL"
_GB = 10**9
_PROBE = 64 * 2**20  # bytes that a disk is tried with, and the seconds after which it is left at that
_PROBE_S = 1.5
_PIECE = b"\xa5" * 2**20


@dataclass(frozen=True)
class Finding:
    """What a check found: its level, its name, what there is (and what to do), and the exit code that a FAIL means."""

    level: str
    name: str
    text: str
    code: int = ConfigError.exit_code

    def told(self) -> dict[str, Any]:
        return asdict(self)


def within(seconds: float, name: str, check: Callable[[], Iterable[Finding]], late: str) -> list[Finding]:
    """The findings of a check, or one FAIL that says `late` where it does not end in time."""
    found: list[list[Finding]] = []
    thread = threading.Thread(target=lambda: found.append(guarded(name, check)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else [Finding(FAIL, name, f"no answer in {seconds:.0f} s ({late})")]


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; an error of it is a FAIL with the error's exit code."""
    try:
        return list(check())
    except RlhfjaxError as error:
        return [Finding(FAIL, name, " ".join(str(error).split()), error.exit_code)]
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Finding(FAIL, name, f"{text} (repair this, or use another machine)")]


def gpus() -> Iterable[Finding]:
    """Memory of NVIDIA GPUs and who uses it, before jax takes any; nothing where there are none."""
    if shutil.which("nvidia-smi") is None:
        return
    names = "index,name,driver_version,memory.used,memory.total"
    for line in _smi(f"--query-gpu={names}"):
        index, kind, driver, used, total = (part.strip() for part in line.split(","))
        text = f"{kind}, driver {driver}, {used} of {total} MiB used"
        busy = used.isdigit() and total.isdigit() and int(used) > 0.1 * int(total)
        remedy = (
            " (another process has it: end that one, or leave the GPU out with CUDA_VISIBLE_DEVICES)" if busy else ""
        )
        yield Finding(FAIL if busy else OK, f"gpu {index}", text + remedy)
    if users := [line for line in _smi("--query-compute-apps=pid,process_name,used_memory") if line]:
        yield Finding(WARN, "gpu processes", f"{'; '.join(users[:4])} (end them, or expect less memory)")


def _smi(query: str) -> list[str]:
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=5).stdout.splitlines()
    except subprocess.SubprocessError as error:
        raise OSError(f"nvidia-smi does not answer: {str(error).splitlines()[0]}") from None


def devices() -> Iterable[Finding]:
    """What jax finds on this host."""
    import jax

    found = jax.local_devices()
    kinds = sorted({str(device.device_kind) for device in found})
    yield Finding(OK, "devices", f"{len(found)} x {', '.join(kinds)} ({found[0].platform})")
    facts = machine()
    driver = facts.get("nvidia_driver")
    if found[0].platform == "cpu" and driver:
        text = f"driver {driver} is there, and jax uses the CPU (install rlhfjax[cuda], or set JAX_PLATFORMS=cpu)"
        asked = os.environ.get("JAX_PLATFORMS") == "cpu"
        yield Finding(OK if asked else FAIL, "driver", "not used, as JAX_PLATFORMS says" if asked else text)
    elif found[0].platform != "cpu":
        yield Finding(OK, "driver", driver or found[0].client.platform_version.splitlines()[0])


def device_count() -> int:
    """Devices of this host, once `devices` has started them."""
    import jax

    return jax.local_device_count()


def disk(name: str, path: Path, least: int = _GB) -> Iterable[Finding]:
    """Room and speed of the disk of a directory, or of the nearest that is there; FAIL where nothing can be written."""
    place = next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    try:
        speed = _speed(place, min(_PROBE, free // 2))
    except OSError as error:
        text = f"{place}: cannot be written to: {error.strerror} (make room or make it writable, or choose another)"
        yield Finding(FAIL, name, text)
        return
    text = f"{place}: {free / _GB:.1f} GB free, {speed / 1e6:.0f} MB/s"
    if free < least:
        yield Finding(FAIL, name, f"{text} (make room: at least {least / _GB:g} GB)")
    elif speed < 20e6:
        yield Finding(WARN, name, f"{text} (saves will keep training waiting; use a faster disk)")
    else:
        yield Finding(OK, name, text)


def _speed(place: Path, most: int) -> float:
    """Bytes a second, synced."""
    began, written = time.monotonic(), 0
    with tempfile.TemporaryFile(prefix=".doctor-", dir=place, buffering=0) as file:
        while written < max(most, len(_PIECE)) and time.monotonic() - began < _PROBE_S:
            written += file.write(_PIECE)
        os.fsync(file.fileno())
    return written / max(time.monotonic() - began, 1e-6)


def limits() -> Iterable[Finding]:
    """Shared memory, open files and memory."""
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        small = " (NCCL and local steps need more: --shm-size, or a volume of memory)" if size < _GB else ""
        yield Finding(WARN if small else OK, "/dev/shm", f"{size / _GB:.1f} GB{small}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = f" (ulimit -n {min(hard, 65536)})" if soft < 1024 else ""
    yield Finding(WARN if few else OK, "open files", f"{soft} of {hard}{few}")
    memory = _memory()
    if memory is not None:
        little = " (end what else runs here, or raise the limit of the container)" if memory < 2 * _GB else ""
        yield Finding(WARN if little else OK, "memory", f"{memory / _GB:.1f} GB to be had{little}")


def _memory() -> int | None:
    """Bytes that this process may still get: of the machine, and of the container that it is in."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
        found += [int(limit) - used] if limit.isdigit() else []
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def proxies(environment: Mapping[str, str], several: bool) -> Iterable[Finding]:
    """Variables that may send processes to a proxy when they look for each other."""
    names = sorted(name for name in environment if "_proxy" in name.lower() and name.lower() != "no_proxy")
    if names:
        remedy = " (unset them if processes do not find each other)" if several else ""
        yield Finding(WARN if several else OK, "proxies", f"{', '.join(names)} set{remedy}")
