"""Measures that are no repeated step: the memory of a loss, and the time from a command to its first step."""

import json
import tempfile
from pathlib import Path

from benchmarks.figures import OURS, Row, row
from benchmarks.systems import ours, peers
from benchmarks.turns import Process, System, WorkerError
from benchmarks.workloads import Workload, cpu_workloads, quick_workloads


def first_step(quick: bool, against_peers: bool) -> list[Row]:
    """Seconds from starting a process to the end of its first PPO iteration: compile cache empty, then filled.

    Peers have no such cache, so their one time stands beside both.
    """
    workload = next(w for w in (quick_workloads() if quick else cpu_workloads()) if w.task == "ppo")
    rows = []
    with tempfile.TemporaryDirectory(prefix="compile_cache_") as cache:
        own = ours()
        kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        cached = System(own.name, own.command, own.environment | kept)
        for state in ("cold", "warm"):
            rows += _launched(cached, workload, f"first_step_{state}/{workload.size}")
    for peer in peers(workload) if against_peers else []:
        once = _launched(peer, workload, "")
        rows += [item | {"workload": f"first_step_{s}/{workload.size}"} for s in ("cold", "warm") for item in once]
    return rows


def _launched(system: System, workload: Workload, name: str) -> list[Row]:
    log = Path(tempfile.mkstemp(prefix="first_step_")[1])
    described = json.dumps(workload.described() | {"warmup": 1})
    process = Process([*system.command, described, *system.arguments], system.environment, log, system.limit)
    try:
        ready = process.answer()
    except WorkerError as error:
        return [row(name, system.name, "failed", str(error), "")]
    finally:
        process.kill()
    return [row(name, system.name, "command_to_first_step_seconds", ready["since_launch_seconds"], "s")]


def loss_memory(quick: bool, _: bool) -> list[Row]:
    """Temporary memory that XLA plans for loss and gradients of a language model, beside the size of its logits.

    One narrow layer, so that almost nothing but the vocabulary takes memory; nothing is run.
    """
    import jax

    from benchmarks.product import model_of, random_tokens
    from rlhfjax.stages.objectives import training_loss
    from rlhfjax.types import TokenBatch

    vocabulary, rows, length = (4096, 2, 64) if quick else (131_072, 8, 512)
    shape = {"layers": 1, "width": 64, "heads": 1, "kv_heads": 1, "mlp_width": 128, "context": length}
    work = {"shape": shape | {"vocab_size": vocabulary}, "dtype": "float32", "seed": 0}
    model = model_of(work)
    algorithm = training_loss(model)
    tokens = random_tokens(work, 0, rows, length)
    batch = TokenBatch(tokens, tokens * 0 + 1, tokens * 0, tokens > 0)

    def loss(params, batch):
        return jax.value_and_grad(algorithm.loss, has_aux=True)(params, batch, algorithm.weight(batch), None)

    params = jax.eval_shape(model.init, jax.random.key(0))
    planned = jax.jit(loss).lower(params, batch).compile().memory_analysis()
    extra, logits = planned.temp_size_in_bytes, rows * length * vocabulary * 4
    name = f"loss_memory/{vocabulary}"
    return [
        row(name, OURS, "logits_bytes", logits, "bytes"),
        row(name, OURS, "temporary_bytes", extra, "bytes"),
        row(name, OURS, "temporary_of_logits", extra / logits, "1"),
    ]


MEASURES = {"first_step": first_step, "loss_memory": loss_memory}
