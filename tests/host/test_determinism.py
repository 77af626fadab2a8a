"""Flags of `determinism: strict`: what is added, what is refused, and that XLA takes it."""

import os
import subprocess
import sys

import pytest
from conftest import IN_ORDER

from rlhfjax.errors import ConfigError
from rlhfjax.host.determinism import strict_flags, use_determinism
from rlhfjax.xla_flags import refused

ADDED = "--xla_gpu_deterministic_ops=true"
EXCLUDE = "--xla_gpu_exclude_nondeterministic_ops"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ADDED),
        ("--xla_dump_to=/x", f"--xla_dump_to=/x {ADDED}"),
        ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops"),
        ("--xla_gpu_deterministic_ops=1", "--xla_gpu_deterministic_ops=1"),
        ("--xla_gpu_deterministic_ops=false --xla_gpu_deterministic_ops=true", None),
        (EXCLUDE, f"{EXCLUDE} {ADDED}"),  # kernels would still be chosen by timing
        ("--xla_a='b c' --xla_d", f"--xla_a='b c' --xla_d {ADDED}"),
    ],
)
def test_what_is_added(given, expected):
    assert strict_flags({"XLA_FLAGS": given}) == (given if expected is None else expected)


def test_kernels_that_were_chosen_once_are_kept(tmp_path):
    kernels = tmp_path / "autotune.textproto"
    load = f"--xla_gpu_load_autotune_results_from={kernels}"
    with pytest.raises(ConfigError, match="expected a file of autotune results, which is not there"):
        strict_flags({"XLA_FLAGS": load})
    kernels.touch()
    assert strict_flags({"XLA_FLAGS": load}) == f"{load} {EXCLUDE}=true"
    assert strict_flags({"XLA_FLAGS": f"{load} {EXCLUDE}=1"}) == f"{load} {EXCLUDE}=1"


def test_flags_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_b\n", encoding="utf-8")
    assert strict_flags({"XLA_FLAGS": str(tmp_path / "flags")}) == f"--xla_a=1 --xla_b {ADDED}"
    with pytest.raises(ConfigError, match="expected flags, or a file with flags: No such file"):
        strict_flags({"XLA_FLAGS": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XLA_FLAGS": "--xla_gpu_deterministic_ops=false"}, "got XLA_FLAGS=--xla_gpu_deterministic_ops=false"),
        ({"XLA_FLAGS": "--xla_gpu_deterministic_ops --xla_gpu_deterministic_ops=0"}, "=0"),  # the last one holds
        ({"XLA_FLAGS": f"{EXCLUDE}=False"}, f"expected {EXCLUDE}=true, or none, got XLA_FLAGS={EXCLUDE}=False"),
        ({"XLA_FLAGS": f"{EXCLUDE}=maybe"}, "expected true or false"),
        (
            {"NCCL_ALGO": "Tree"},
            "expected one of Ring, CollnetDirect, CollnetChain, ^NVLS, or none, got NCCL_ALGO=Tree",
        ),
        ({"NCCL_ALGO": "Ring,Tree"}, "got NCCL_ALGO=Ring,Tree"),
    ],
)
def test_what_is_refused(variables, expected):
    with pytest.raises(ConfigError) as caught:
        strict_flags(variables)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("algorithm", ["", "Ring", "ring", "CollnetDirect", "^NVLS"])
def test_algorithms_of_nccl_that_add_in_one_order(algorithm):
    assert strict_flags({"NCCL_ALGO": algorithm}) == ADDED


def test_fast_changes_nothing(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    use_determinism("fast")
    with pytest.raises(ConfigError):
        use_determinism("strict")


def test_xla_takes_each_flag_of_ours():
    others = (IN_ORDER, "--xla_gpu_enable_command_buffer=")  # of several processes, and of programs on GPUs
    assert refused([ADDED, f"{EXCLUDE}=true", *others]) == []


def test_an_xla_without_the_flag_is_no_strict_one(monkeypatch):
    monkeypatch.setattr("rlhfjax.host.determinism.refused", lambda words: [word for word in words if word == ADDED])
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(ConfigError, match=f"strict: this jaxlib takes no {ADDED}; choose determinism fast"):
        use_determinism("strict")


def test_the_flag_is_set_before_jax_is_imported():
    program = (
        "import os, sys; from rlhfjax.host.determinism import use_determinism\n"
        "use_determinism('strict'); assert 'jax' not in sys.modules; print(os.environ['XLA_FLAGS'])"
    )
    environment = os.environ | {"XLA_FLAGS": ""}
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip() == ADDED
