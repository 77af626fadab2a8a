"""CPUs as the devices of several processes: into how many each is split, and what their collectives need of XLA."""

import os
from collections.abc import Callable
from typing import Any

import jax

from rlhfjax.errors import ConfigError
from rlhfjax.xla_flags import refused, words_of

DEVICES = "RLHFJAX_DEVICES_PER_PROCESS"
# With the scheduler that is the default, programs may start their collectives in another order in each process.
_IN_ORDER = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
_THREADS = 8  # of each of several CPU devices
_SCHEDULERS = ("--xla_cpu_scheduler_type", "--xla_cpu_enable_concurrency_optimized_scheduler")  # somebody's choice
# A collective gives up after half an hour, which may be before the deadline of who it waits for: 30 days.
_PATIENT = "--xla_cpu_collective_timeout_seconds=2592000"


def prepare(several: bool, say: Callable[[str], None]) -> None:
    """What must be set before jax starts its devices, of a process by itself or of one of several."""
    split_devices()
    if not several:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    use_order(say)
    _use_threads(int(os.environ.get(DEVICES, "1")))
    _keep_programs_of_all()


def split_devices() -> None:
    """Let jax make as many devices of a CPU as the variable says."""
    if DEVICES in os.environ:
        if not os.environ[DEVICES].isdigit() or int(os.environ[DEVICES]) == 0:
            raise ConfigError(f"{DEVICES}: expected a whole number above 0, got {os.environ[DEVICES]!r}")
        jax.config.update("jax_num_cpu_devices", int(os.environ[DEVICES]))


def _use_threads(devices: int) -> None:
    """Give XLA, which reads NPROC, threads for the collectives of so many CPU devices of this process.

    A collective holds one until the other processes have come to it. By default there is one for each core or device,
    which a few programs in flight spend; where the others spent theirs on other collectives, all wait for ever.
    """
    if devices > 1 and "NPROC" not in os.environ:
        os.environ["NPROC"] = str(max(_THREADS * devices, os.cpu_count() or 1))


def use_order(say: Callable[[str], None]) -> None:
    """Let XLA_FLAGS have programs start their collectives in one order and wait in them, unless they say otherwise."""
    words = words_of(os.environ.get("XLA_FLAGS", ""))
    if not any(word.startswith(_PATIENT.partition("=")[0]) for word in words) and not refused([_PATIENT]):
        words = [*words, _PATIENT]
    if not any(word.startswith(_SCHEDULERS) for word in words):
        if refused([_IN_ORDER]):
            say(f"this jaxlib takes no {_IN_ORDER}: collectives of processes on CPUs may wait for each other")
        else:
            words = [*words, _IN_ORDER]
    os.environ["XLA_FLAGS"] = " ".join(words)


def _keep_programs_of_all() -> None:
    """Let each process keep its compiled CPU programs, and not the first alone.

    On CPUs they have another key in each process, so that what jax keeps, those of process 0, serves no other: all but
    one would compile everything at every start.
    """
    # jax has no public name for this.
    from jax._src import compilation_cache, compiler

    first_alone: Any = compiler._cache_write
    config: Any = jax.config

    def write(key: str, seconds: float, name: str, backend: Any, executable: Any, *rest: Any) -> None:
        if backend.platform != "cpu" or any(rest) or seconds < config.jax_persistent_cache_min_compile_time_secs:
            first_alone(key, seconds, name, backend, executable, *rest)
            return
        try:
            compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
        except Exception:  # as jax has it: what is not kept is compiled again
            return

    if not hasattr(first_alone, "of_all"):
        write.of_all = True  # pyright: ignore[reportFunctionMemberAccess]
        compiler._cache_write = write
