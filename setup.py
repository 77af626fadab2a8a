"""Packages of the wheel: what pyproject.toml cannot say is that `configs/` goes in as `rlhfjax.configs`."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["rlhfjax*"]), "rlhfjax.configs"],
    package_dir={"rlhfjax.configs": "configs"},
)
