"""Peaks of this machine, measured: matrix products and reading memory. Shares are of these numbers.

python -m benchmarks.peaks
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _fastest(step: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, in seconds; a peak is what nothing disturbed."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - began)
    return best


def matmul_flops(dtype: str, sizes: tuple[int, ...], seconds: float = 1.0) -> float:
    """The most operations per second of square matrix products of these sizes, through XLA."""
    import jax
    import jax.numpy as jnp

    found = []
    for size in sizes:
        keys = jax.random.split(jax.random.key(size))
        a, b = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in keys)
        times = max(1, (1 << 33) // (2 * size**3))  # a few ms of work, so that dispatch does not count

        @jax.jit
        def chain(a, b, times=times, size=size):
            return jax.lax.fori_loop(0, times, lambda _, x: (x @ b) * (1.0 / size**0.5), a)

        jax.block_until_ready(chain(a, b))
        fastest = _fastest(lambda run=chain, a=a, b=b: jax.block_until_ready(run(a, b)), seconds)
        found.append(times * 2 * size**3 / fastest)
    return max(found)


def read_bandwidth(megabytes: int, seconds: float = 1.0) -> float:
    """Bytes a second of the best of two ways to read a float32 array that no cache holds: a sum, a matrix · vector."""
    import jax
    import jax.numpy as jnp

    side = 4096
    array = jnp.ones((megabytes * (1 << 20) // 4 // side, side), jnp.float32)
    vector = jnp.ones((side,), jnp.float32)
    size = array.size * 4
    best = 0.0
    for function, inputs in ((jnp.sum, (array,)), (jnp.dot, (array, vector))):
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*inputs))
        best = max(
            best, size / _fastest(lambda run=compiled, given=inputs: jax.block_until_ready(run(*given)), seconds)
        )
    return best


def copy_free_read(megabytes: int, seconds: float = 1.0) -> float:
    """Bytes a second that numpy's dot reads on all cores; a second opinion on a CPU, where XLA's sum has one thread."""
    from concurrent.futures import ThreadPoolExecutor
    from os import cpu_count

    import numpy as np

    workers = cpu_count() or 1
    parts = [np.ones(megabytes * (1 << 20) // 4 // workers, np.float32) for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        time_taken = _fastest(lambda: list(pool.map(np.max, parts)), seconds)
    return sum(part.nbytes for part in parts) / time_taken


def measure(quick: bool = False) -> dict[str, float]:
    """`flops_float32`, on accelerators `flops_bfloat16`, and `bytes_per_second`."""
    import jax

    cpu, seconds = jax.default_backend() == "cpu", 0.05 if quick else 1.0
    if cpu:
        sizes, megabytes = ((256,) if quick else (512, 1024, 2048)), (16 if quick else 512)
        read = max(read_bandwidth(megabytes, seconds), copy_free_read(megabytes, seconds))
        return {"flops_float32": matmul_flops("float32", sizes, seconds), "bytes_per_second": read}
    sizes = (1024,) if quick else (4096, 8192)
    return {
        "flops_float32": matmul_flops("float32", sizes, seconds),
        "flops_bfloat16": matmul_flops("bfloat16", sizes, seconds),
        "bytes_per_second": read_bandwidth(256 if quick else 4096, seconds),
    }


def hardware() -> str:
    """The accelerator, or the processor and the cores that this process may use."""
    import jax

    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


if __name__ == "__main__":
    print(json.dumps({"hardware": hardware()} | measure("--quick" in sys.argv)))
