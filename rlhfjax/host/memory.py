"""Freed host memory: kept by this process or given back to the system."""

import ctypes
import gc
import os
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.shape import model_shape, parameter_count

SMALL = 32_000_000  # parameters
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h
_GROWTH, _KEPT = 64 * 2**20, 2**30  # bytes by which the heap grows at least, and that it may hold for nothing
_PAGE = 4096
_in_caller: list[bool] = []  # whether programs run in the thread that calls them; of the process


def keep_freed_memory_of(run: Run, alone: bool) -> bool:
    """`keep_freed_memory` for the model of a configuration; one whose size no configuration tells counts as large."""
    if run.model.checkpoint or run.tokenizer.path:
        return False
    return keep_freed_memory(parameter_count(model_shape(run.model), run.tokenizer.vocab_size), alone)


def collect_seldom() -> None:
    """Let Python look for cycles that nobody holds after 50,000 new objects, not after 700.

    Traces and modules are many objects that stay, and are looked through again and again: a tenth of a warm start.
    """
    gc.set_threshold(50_000)


def keep_freed_memory(parameters: int, alone: bool = True) -> bool:
    """Let glibc keep what is freed for the next allocation; False without glibc or where the model is not small.

    On a CPU XLA allocates the arrays inside a program anew in every call. Beyond 32 MiB glibc gives such a block back
    to the kernel, and each of its pages is mapped and zeroed again: 80,000 page faults a training step of a small
    model, a seventh of its time. The price is memory: an aligned block does not always go where one of its size has
    been, so the heap grows. A thread gives free pages back whenever it has grown by a GiB. Larger models keep what
    glibc does by itself. Call it before jax is imported: threads that exist keep their own heaps.

    Only the main thread's heap holds such blocks; what is too large for another's is mapped and unmapped again. A
    process that is `alone`, with one device, therefore runs its programs there (`run_in_caller`), and compiling threads
    have heaps of their own: with one for all they wait for each other a quarter of the time. jax runs programs
    of several devices in other threads, so there all have the main thread's.
    """
    libc = ctypes.CDLL(None)
    if not sys.platform.startswith("linux") or not hasattr(libc, "mallopt") or parameters > SMALL:
        return False
    alone = alone and "device_count" not in os.environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in os.environ
    one_heap = () if alone else ((_ARENA_MAX, 1),)
    for name, value in (*one_heap, (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH)):
        if libc.mallopt(name, value) != 1:
            return False
    _in_caller.append(alone)
    Thread(target=_bound, args=(libc,), name="freed-memory", daemon=True).start()
    return True


def run_in_caller() -> None:
    """Where `keep_freed_memory` needs it, let jax run programs in the thread that calls them; before the first one."""
    if any(_in_caller):
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _bound(libc: Any) -> None:
    held = _resident()
    while True:
        time.sleep(0.5)
        if _resident() > held + _KEPT:
            libc.malloc_trim(0)
            held = _resident()


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
