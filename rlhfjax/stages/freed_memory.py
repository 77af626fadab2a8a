"""What this process does with host memory that it no longer needs."""

import ctypes
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


def keep_freed_memory_of(run: Run) -> bool:
    """`keep_freed_memory` for the model of a configuration; one whose size no configuration tells counts as large."""
    if run.model.checkpoint or run.tokenizer.path:
        return False
    return keep_freed_memory(parameter_count(model_shape(run.model), run.tokenizer.vocab_size))


def keep_freed_memory(parameters: int) -> bool:
    """Let glibc keep what is freed for the next allocation; False without glibc or where the model is not small.

    On a CPU XLA allocates the arrays inside a program anew in every call. Beyond 32 MiB glibc gives such a block back
    to the kernel, and each of its pages is mapped and zeroed again: 80,000 page faults a training step of a small
    model, a seventh of its time. The price is memory: an aligned block does not always go where one of its size has
    been, so the heap grows. A thread gives free pages back whenever it has grown by a GiB. Larger models keep what
    glibc does by itself. Call it before jax is imported: threads that exist keep their own heaps.
    """
    libc = ctypes.CDLL(None)
    if not sys.platform.startswith("linux") or not hasattr(libc, "mallopt") or parameters > SMALL:
        return False
    # One heap for all threads: a block that is too large for a thread's own heap would be mapped and unmapped again.
    for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH)):
        if libc.mallopt(name, value) != 1:
            return False
    Thread(target=_bound, args=(libc,), name="freed-memory", daemon=True).start()
    return True


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
