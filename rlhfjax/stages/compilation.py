"""Compiling: a stage has its programs made in threads of their own while it reads its data.

XLA's compiler holds no lock of Python, so programs are traced one after the other and compiled side by side.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax import layout
from rlhfjax.host import marks, processes
from rlhfjax.stages import contract
from rlhfjax.target import Target, building_for, current, machine
from rlhfjax.training.online import OnlineSteps
from rlhfjax.xla_flags import refused

# Of MaxText's tuned configurations of TPUs (benchmarks/xla_flags_library.py); docs/pods.md has what they change.
_ON_TPUS = {
    # No products in windows (`DISABLE_COLLECTIVE_MATMUL`): under each, the inputs of a layer travel once more, of which
    # several products read one.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Gradients are scattered, where else they would be summed everywhere and then cut: when a device's part of their
    # last axis is as narrow as a tile (`LAYOUT_FOR_ALL_REDUCE_SCATTER`).
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
# LLVM takes most of the time in which XLA compiles for CPUs: with these a training step takes a quarter of it, and runs
# for twice as long. Products are the same; their sums with what surrounds them may differ in the last bit.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SMALL = 1_000_000  # parameters; with ten times as many a dozen steps take longer than the compiler gains


def step_options(mesh: jax.sharding.Mesh, params: Any) -> dict[str, Any] | None:
    """`training_options`, and of a small model on devices that a process only pretends to have, `QUICK` ones.

    Who divides a CPU tries out a mesh, and waits for the compiler. `params` may be of shapes.
    """
    devices = list(mesh.devices.flat)
    pretended = devices[0].platform == "cpu" and len(devices) > len({device.process_index for device in devices})
    if not pretended or sum(math.prod(x.shape) for x in jax.tree.leaves(params)) > SMALL:
        return training_options(mesh)
    return {name: value for name, value in QUICK.items() if not refused([f"--{name}={str(value).lower()}"])}


def training_options(mesh: jax.sharding.Mesh, target: Target | None = None) -> dict[str, str] | None:
    """Compiler options of a target's programs that run whole models over whole batches (None: of the current one's).

    On GPUs they are not recorded as CUDA graphs: cuDNN's attention inside a recorded loop ended with a launch failure
    (jax 0.11.2, H100), and such programs do not wait for launches. On TPUs they say how products and collectives are
    put together. A compiler that lacks an option does without.
    """
    platform = (target or current()).platform
    if platform == "tpu":
        devices = list(mesh.devices.flat)
        here = next((device for device in devices if device.process_index == jax.process_index()), devices[0])
        return {name: value for name, value in _ON_TPUS.items() if knows(here, name, value)}
    if platform != "gpu" or refused(["--xla_gpu_enable_command_buffer="]):
        return None
    return {"xla_gpu_enable_command_buffer": ""}


@cache
def knows(device: Any, name: str, value: str) -> bool:
    """Whether the compiler for a device, which need not be here, has an option."""
    place = jax.sharding.SingleDeviceSharding(device)
    program = jax.jit(lambda: jnp.zeros(()), out_shardings=place, compiler_options={name: value})
    try:
        program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def unbound(function: Any) -> tuple[tuple, Any]:
    """The first arguments that `partial` binds, and the jitted function that they are bound to."""
    return (function.args, function.func) if isinstance(function, partial) else ((), function)


class Program:
    """A jitted function that is traced and compiled in threads; a call waits for that once.

    jax finds again what it has compiled for these shapes and layouts, so the call is the function's own: others would
    be compiled anew, and an error of the compiler comes from the first call.
    """

    def __init__(self, tracer: Executor, compiler: Executor, function: Any, arguments: Callable[[], tuple]):
        self._function, self._called = function, False
        bound, jitted = unbound(function)
        here = current(), layout.current()  # of this thread; those that trace and compile have none
        plan = contract.current()

        def lower() -> Any:
            with building_for(here[0]), layout.laid_out_by(here[1]):
                return jitted.lower(*bound, *arguments())

        def compile_it() -> float:
            lowered, before = self._lowered.result(), contract.hits()
            lowered.compile()
            if plan:
                plan.note(plan.recognised(lowered), getattr(jitted, "__name__", "program"), contract.hits() > before)
            return time.monotonic()

        self._lowered: Future = tracer.submit(lower)
        self.ready: Future = compiler.submit(compile_it)

    def shapes(self) -> Any:
        """What a call gives, as shapes with their layouts; waits for the trace alone."""
        return self._lowered.result().out_info

    def __call__(self, *arguments: Any) -> Any:
        if not self._called:
            with marks.inside(marks.COMPILING):
                self.ready.result()
            processes.barrier("compiled")  # on CPUs a collective gives up when another process still compiles
            self._called = True
        with marks.inside(marks.PROGRAM):  # on CPUs some programs run in the call
            return self._function(*arguments)


def in_turn(
    steps: OnlineSteps,
    state: Any,
    frozen: Any,
    prompts: Any,
    pretraining: Any,
    later: Callable[[Any, Callable[[], tuple]], Any],
) -> OnlineSteps:
    """The steps of an iteration, each made by `later` of a function and what finds its arguments.

    Those of one are `shapes()` of what was made of the one before it; the others may be of shapes themselves.
    """
    params, key = state.train.params, jax.random.key(0)
    served, reshard = lambda: params, steps.reshard
    if reshard is not None:
        reshard = later(reshard, lambda: (params,))
        served = reshard.shapes
    rollout = later(steps.rollout, lambda: (served(), prompts, key))
    score = later(steps.score, lambda: (params, frozen, rollout.shapes()))
    estimate = later(steps.estimate, lambda: (score.shapes(), state.kl_coef))

    def learned() -> tuple:
        experience, measured = estimate.shapes()
        return state, experience, pretraining, measured, key

    update = later(steps.update, learned)
    return replace(steps, rollout=rollout, score=score, estimate=estimate, update=update, reshard=reshard)


class Ahead:
    """Compiles the programs of a stage in threads of its own while the stage goes on, and says how long it took."""

    def __init__(self, stage: str, began: float | None = None):
        """`began` is when the stage did, by `time.monotonic`."""
        self._stage, self._began = stage, time.monotonic()
        self._stage_began = self._began if began is None else began
        # Two traces at once only take the interpreter from each other, more programs than cores their memory.
        self._tracer = ThreadPoolExecutor(1, thread_name_prefix="trace")
        cores = os.cpu_count() if machine().platform == "cpu" else None
        self._compiler = ThreadPoolExecutor(cores, thread_name_prefix="compile")
        self._programs: list[Program] = []
        self._afterwards: list[tuple] = []
        self.facts: dict[str, float] = {}

    def program(self, function: Any, *arguments: Any) -> Program:
        """`function` for such arguments: jitted, perhaps with its first arguments bound by `partial`."""
        return self._later(function, lambda: arguments)

    def afterwards(self, function: Any, *arguments: Any) -> None:
        """A program needed later, as one that validates, compiled while a device takes the first steps."""
        self._afterwards.append((function, arguments))

    def online(self, steps: OnlineSteps, state: Any, frozen: Any, prompts: Any, pretraining: Any) -> OnlineSteps:
        """The steps of an iteration over such a state, frozen parameters, prompts and pretraining batch."""
        return in_turn(steps, state, frozen, prompts, pretraining, self._later)

    def _later(self, function: Any, arguments: Callable[[], tuple]) -> Program:
        self._programs.append(Program(self._tracer, self._compiler, function, arguments))
        return self._programs[-1]

    def first_step(self) -> str:
        """Called when the first step is done: keeps how long that took as facts of the stage, and says it."""
        now = time.monotonic()
        compiled = max((program.ready.result() for program in self._programs), default=now) - self._began
        first = now - self._stage_began
        # On a CPU the compiler would take the cores from the steps.
        for function, arguments in self._afterwards if machine().platform != "cpu" else ():
            Program(self._tracer, self._compiler, function, lambda arguments=arguments: arguments)
        self._tracer.shutdown(wait=False)
        self._compiler.shutdown(wait=False)
        self.facts = {"timing/compile_s": round(compiled, 2), "timing/first_step_s": round(first, 2)}
        said = f"{self._stage}: compiled in {compiled:.1f} s, first step after {first:.1f} s"
        plan = contract.current()
        return f"{said}; {plan.said()}" if plan else said
