"""A fault happens where and when it is asked for, and nowhere else."""

import os
import signal
import subprocess
import sys

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.faults import Fault, read_fault, read_faults

STEPS = """
from rlhfjax import faults
for step in range(4):
    faults.reach("save", step)
    print(step, flush=True)
"""
FACTORS = """
from rlhfjax import faults
print([faults.factor("sft", step) for step in range(4)], faults.wanted("sft"))
"""


def reached(fault, program=STEPS, allowed="1"):
    variables = os.environ | {"RLHFJAX_FAULT": fault, "RLHFJAX_ALLOW_FAULTS": allowed, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sigkill@save:2", Fault("sigkill", "save", 2)),
        ("sigterm@ppo:3:proc1", Fault("sigterm", "ppo", 3, 1)),
        ("nan@sft:5+", Fault("nan", "sft", 5, None, True)),
        ("nan@sft:5+:0", Fault("nan", "sft", 5, 0, True)),
    ],
)
def test_reading(text, fault):
    assert read_fault(text, True) == fault
    assert read_fault("", False) is None


def test_several_happen_one_after_the_other(tmp_path):
    both = [Fault("slow", "save", 1), Fault("full", "save", 2, 0)]
    assert read_faults("slow@save:1,full@save:2:0", True) == both
    assert read_faults(None, False) == []
    done = reached("sigstop@other:0,sigterm@save:5,full@save:2")
    assert done.stdout.split() == ["0", "1"]
    assert "[Errno 28] No space left on device" in done.stderr


@pytest.mark.parametrize("text", ["sigkill", "sigkill@save", "sigkill@save:two", "fire@save:2", "sigkill@a:1:2:3"])
def test_what_cannot_be_read(text):
    with pytest.raises(ConfigError, match="KIND@POINT:STEP"):
        read_fault(text, True)


def test_faults_must_be_allowed():
    with pytest.raises(ConfigError, match="RLHFJAX_ALLOW_FAULTS=1"):
        read_fault("sigkill@save:2", False)
    done = reached("sigkill@save:2", allowed="0")
    assert done.stdout == ""
    assert "RLHFJAX_ALLOW_FAULTS=1" in done.stderr


@pytest.mark.parametrize("kind", ["sigkill", "sigterm", "sigsegv"])
def test_a_signal_at_its_step(kind):
    done = reached(f"{kind}@save:2")
    assert done.stdout == "0\n1\n"
    assert done.returncode == -getattr(signal, kind.upper())


def test_a_bug_is_a_bug():
    done = reached("exception@save:1")
    assert done.stdout == "0\n"
    assert "InjectedFault" in done.stderr


@pytest.mark.parametrize("fault", ["sigkill@load:2", "sigkill@save:9", "nan@save:2", "sigkill@save:2:7"])
def test_elsewhere_nothing_happens(fault):
    done = reached(fault)
    assert (done.returncode, done.stdout) == (0, "0\n1\n2\n3\n")


def test_factors():
    assert reached("nan@sft:2", FACTORS).stdout == "[1.0, 1.0, nan, 1.0] True\n"
    assert reached("inf@sft:2+", FACTORS).stdout == "[1.0, 1.0, inf, inf] True\n"
    assert reached("nan@ppo:2", FACTORS).stdout == "[1.0, 1.0, 1.0, 1.0] False\n"
