"""What a bug report needs to know of this machine: versions, platform, devices, flags. Nothing personal."""

import importlib.metadata
import os
import platform

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
)


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
