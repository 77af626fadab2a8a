"""Versions of what decides what a program becomes."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt", "flax", "rlhfjax")


@cache
def versions() -> dict[str, str]:
    """By package, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
