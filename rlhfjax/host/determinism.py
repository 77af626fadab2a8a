"""`reliability.determinism: strict`: flags that make a GPU give the same bits again, set and checked before jax starts.

XLA's programs on CPUs and TPUs are deterministic as they are. On GPUs some operations add in the order in which threads
finish (scatters, atomic reductions), and autotuning chooses other kernels from one process to the next.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.xla_flags import refused, words_of

DETERMINISTIC = "xla_gpu_deterministic_ops"  # excludes nondeterministic operations and turns autotuning off
EXCLUDE = "xla_gpu_exclude_nondeterministic_ops"
LOAD = "xla_gpu_load_autotune_results_from"
# NCCL's trees add in an order that depends on timing; these do not (^NVLS excludes one algorithm and leaves the rest).
_ORDERED_NCCL = ("Ring", "CollnetDirect", "CollnetChain", "^NVLS")
_TRUE, _FALSE = ("", "true", "1"), ("false", "0")


def use_determinism(kind: str) -> None:
    """Set what `kind` (strict or fast) needs in this process's environment; fast needs nothing.

    Raises ConfigError for values that contradict strict, and where jax has its devices already without the flag.
    """
    if kind != "strict":
        return
    wanted = strict_flags(os.environ)
    if bad := refused(words_of(wanted)):
        raise ConfigError(
            f"reliability.determinism strict: this jaxlib takes no {' '.join(bad)}; choose determinism fast"
        )
    started = sys.modules.get("jax._src.xla_bridge")
    if wanted != os.environ.get("XLA_FLAGS") and started and started.backends_are_initialized():
        import jax

        if jax.default_backend() == "gpu":
            raise ConfigError(f"reliability.determinism strict: set XLA_FLAGS={wanted!r} before jax starts its devices")
        return
    os.environ["XLA_FLAGS"] = wanted


def strict_flags(environment: Mapping[str, str]) -> str:
    """What XLA_FLAGS must be for the same bits again: the flags that are there and `--xla_gpu_deterministic_ops=true`.

    Kernels chosen once by autotuning are kept where `--xla_gpu_load_autotune_results_from=FILE` names them; then the
    flag that is added is `--xla_gpu_exclude_nondeterministic_ops=true`. Raises ConfigError for flags, or an NCCL_ALGO,
    that say the contrary.
    """
    algorithm = environment.get("NCCL_ALGO", "")
    if algorithm and algorithm.lower() not in (name.lower() for name in _ORDERED_NCCL):
        raise _contrary(f"NCCL_ALGO={algorithm}", f"one of {', '.join(_ORDERED_NCCL)}, or none")
    words = words_of(environment.get("XLA_FLAGS", ""))
    flags = read_flags(words)
    for name in (DETERMINISTIC, EXCLUDE):
        if flags.get(name, "true").lower() in _FALSE:
            raise _contrary(f"XLA_FLAGS=--{name}={flags[name]}", f"--{name}=true, or none")
        if flags.get(name, "true").lower() not in _TRUE:
            raise ConfigError(f"XLA_FLAGS=--{name}={flags[name]}: expected true or false")
    if kernels := flags.get(LOAD):
        if not Path(kernels).is_file():
            raise ConfigError(f"XLA_FLAGS=--{LOAD}={kernels}: expected a file of autotune results, which is not there")
        needed = EXCLUDE
    else:
        needed = DETERMINISTIC
    return " ".join(words if needed in flags else [*words, f"--{needed}=true"])


def read_flags(words: list[str]) -> dict[str, str]:
    """`["--xla_a=1", "--xla_b"]` as {"xla_a": "1", "xla_b": ""}; of a flag that is given twice the last holds."""
    pairs: dict[str, Any] = {}
    for word in words:
        name, _, value = word.lstrip("-").partition("=")
        pairs[name] = value.strip("\"'")
    return pairs


def _contrary(got: str, expected: str) -> ConfigError:
    return ConfigError(
        f"reliability.determinism strict: expected {expected}, got {got}; remove it, or choose determinism fast"
    )
