"""Facts of this machine for a bug report, and for a run that shall be reproduced. Nothing personal."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

PACKAGES = (
    "rlhfjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "array-record",
    "grain",
    "sentencepiece",
    "numpy",
    "pydantic",
    "typer",
    "libtpu",
    "jax-cuda13-plugin",
)
# Only these: the rest of an environment holds names, paths and tokens.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_THREEFRY_PARTITIONABLE",
    "JAX_ENABLE_COMPILATION_CACHE",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
# Settings of jax that change numbers, however they were set.
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
)
_EXTRAS = ("judges", "parquet", "cuda", "tpu")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[([^\]]*)\])?")


def environment_report() -> str:
    """Lines of `name  value`; starts jax to list its devices, and says so where that fails."""
    rows = [
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("platform", platform.platform()),
        ("cores", str(os.cpu_count())),
        *package_versions().items(),
        *flags().items(),
        ("devices", _devices()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows if value)


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def needed_versions() -> dict[str, str]:
    """Versions of all installed distributions that rlhfjax needs, of those that these need, and of jax's plugins."""
    found: dict[str, str] = {}
    plugins = {point.dist.name for point in importlib.metadata.entry_points(group="jax_plugins") if point.dist}
    waiting: list[tuple[str, frozenset[str]]] = [("rlhfjax", frozenset(_EXTRAS)), ("libtpu", frozenset())]
    waiting += [(name, frozenset()) for name in sorted(plugins)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        key = _normal(name), extras
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        found[key[0]] = distribution.version
        waiting += [need for text in distribution.requires or () if (need := _needed(text, extras))]
    return dict(sorted(found.items()))


def _needed(requirement: str, extras: frozenset[str]) -> tuple[str, frozenset[str]] | None:
    """(name, extras) of `jax[cuda13]>=0.10; extra == "cuda"`, unless it belongs to an extra that nobody asked for.

    Other markers are not read: what they leave out is not installed.
    """
    text, _, marker = requirement.partition(";")
    asked = re.findall(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
    match = _REQUIREMENT.match(text)
    if match is None or (asked and not {_normal(name) for name in asked} & extras):
        return None
    return match[1], frozenset(_normal(extra.strip()) for extra in (match[2] or "").split(",") if extra.strip())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def settings() -> dict[str, Any]:
    """The settings of jax that change numbers."""
    import jax

    values = {name: getattr(jax.config, name, None) for name in SETTINGS}
    return {name: value if isinstance(value, bool | None) else str(value) for name, value in values.items()}


def machine() -> dict[str, Any]:
    """Processor, the cores that this process may use, operating system and C library, driver of an NVIDIA GPU."""
    facts = {
        "architecture": platform.machine(),
        "processor": _first_match(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "nvidia_driver": _first_match(Path("/proc/driver/nvidia/version"), r"Kernel Module\D*([\d.]+)"),
    }
    return {name: value for name, value in facts.items() if value}


def _first_match(path: Path, pattern: str) -> str:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return ""
    return match[1].strip() if match else ""


def flags() -> dict[str, str]:
    """The variables that change what jax does, where they are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> str:
    try:
        import jax

        devices = jax.devices()
    except (ImportError, RuntimeError) as error:  # no jaxlib for this machine; no driver, or devices in use
        return f"none: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    kinds = sorted({device.device_kind for device in devices})
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()}){processes}"
