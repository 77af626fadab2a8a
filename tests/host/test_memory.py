"""What the kernel counts, pages that a program's own arrays touch for the first time; and what glibc says of itself."""

import gc
import subprocess
import sys

import pytest

from rlhfjax.host.memory import collect_seldom

PROGRAM = """
import ctypes, resource, sys
from rlhfjax.host.memory import SMALL, keep_freed_memory, run_in_caller
beyond, alone = map(int, sys.argv[1:])
assert keep_freed_memory(SMALL + beyond, bool(alone)) == (beyond == 0)
run_in_caller()
import jax, jax.numpy as jnp

@jax.jit
def program(x):  # 64 MiB inside that no fusion can leave out
    y = jnp.outer(x, x)
    return jnp.flip(y @ y[:, :8], 0) @ y[:8, :1]

x, faults = jnp.ones(4096), []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
print(min(faults[2:]), flush=True)
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


def faults_and_heaps(beyond_small: int, alone: bool) -> tuple[int, int]:
    """Page faults of the call that has the fewest, the first two left out, and how many heaps the threads have."""
    command = [sys.executable, "-c", PROGRAM, str(beyond_small), str(int(alone))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said.split()[0]), said.count("<heap nr=")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told what to keep")
def test_arrays_inside_a_program_of_a_small_model_are_not_mapped_anew_in_every_call() -> None:
    # Broken once: without the one heap, or without programs in the calling thread, every call faults like the first.
    assert faults_and_heaps(1, alone=True)[0] > 32 * 2**20 // 4096  # half of them at least, in pages of 4 KiB
    faults, heaps = faults_and_heaps(0, alone=True)
    assert faults < 1000
    assert heaps > 1
    faults, heaps = faults_and_heaps(0, alone=False)
    assert faults < 1000
    assert heaps == 1


HEAP = """
import threading, time
from types import SimpleNamespace
from rlhfjax.host import memory as freed_memory
begun, freed = threading.Event(), threading.Event()

def sleep(seconds):  # a thread that looks while the blocks are there finds that they are what it holds
    begun.set()
    freed.wait()
    time.sleep(seconds)

freed_memory.time = SimpleNamespace(sleep=sleep)
freed_memory._KEPT = 64 * 2**20
assert freed_memory.keep_freed_memory(0)
assert begun.wait(300), "waited 300 s for the thread to begin"
blocks = [bytes([n]) * 2**20 for n in range(256)]
last = b"x" * 2**20  # the heap does not end with what is freed
full = freed_memory._resident()
del blocks
freed.set()
deadline = time.monotonic() + 300
while freed_memory._resident() > full - 200 * 2**20:
    assert time.monotonic() < deadline, "waited 300 s for the thread to give free pages back"
    time.sleep(0.1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told what to keep")
def test_what_is_kept_is_bounded() -> None:
    # Broken once: without the thread 256 MiB of free pages stay for good.
    subprocess.run([sys.executable, "-c", HEAP], check=True)


def test_python_looks_for_cycles_after_many_objects_alone() -> None:
    # Fails with the interpreter's own threshold: about 28 times.
    before, phases = gc.get_threshold(), []

    def listen(phase: str, _: dict) -> None:
        phases.append(phase)

    gc.callbacks.append(listen)
    try:
        gc.set_threshold(700, 10, 10)
        collect_seldom()
        gc.collect()
        phases.clear()
        kept = [[] for _ in range(20_000)]
        assert (len(kept), phases) == (20_000, [])
    finally:
        gc.callbacks.remove(listen)
        gc.set_threshold(*before)
