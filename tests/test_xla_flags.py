"""Flags that the installed XLA does not know end no process: they are asked for, kept by version, and named."""

import os
import subprocess

import pytest
from conftest import IN_ORDER
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.errors import ConfigError
from rlhfjax.host.cpus import use_order
from rlhfjax.xla_flags import check_flags, refused, words_of

GOOD, BAD, UNREADABLE = "--xla_dump_hlo_as_text", "--xla_no_such_flag=true", "--xla_cpu_multi_thread_eigen=7"
PATIENT = "--xla_cpu_collective_timeout_seconds=2592000"
OWN = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def asked(monkeypatch):
    """What XLA is asked, of an XLA that knows every flag but BAD."""
    seen = []

    def run(words, env, **_):
        seen.append(env["XLA_FLAGS"])
        return subprocess.CompletedProcess(words, 1, b"" if BAD in env["XLA_FLAGS"] else b"alive\n")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_a_flag_that_xla_would_end_the_process_for_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{GOOD} {BAD} {UNREADABLE}")
    result = CliRunner().invoke(app, ["run", "quickstart"])
    assert result.exit_code == 2
    assert f"got {BAD} {UNREADABLE};" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_xla_is_asked_once_for_a_version_of_jaxlib(asked, monkeypatch):
    for _ in range(2):
        assert refused([GOOD, "--xla_a"]) == []
    assert asked == [f"{GOOD} --xla_a"]
    monkeypatch.setattr("rlhfjax.xla_flags._version", lambda: "99.0")
    assert refused([GOOD, "--xla_a"]) == []
    assert len(asked) == 2


def test_what_is_refused_is_asked_again(asked):
    for _ in range(2):
        assert refused([GOOD, BAD]) == [BAD]
    assert asked == [f"{GOOD} {BAD}", GOOD, BAD, f"{GOOD} {BAD}", BAD]


def test_no_flags_need_no_answer(asked):
    check_flags({})
    check_flags({"XLA_FLAGS": "  "})
    assert asked == []


def test_flags_in_a_file(asked, tmp_path):
    (tmp_path / "flags").write_text(f"{GOOD}\n--xla_b='c d'\n", encoding="utf-8")
    assert words_of(str(tmp_path / "flags")) == [GOOD, "--xla_b='c d'"]
    with pytest.raises(ConfigError, match="a file with flags: No such file"):
        check_flags({"XLA_FLAGS": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, f"{PATIENT} {IN_ORDER}"),
        (GOOD, f"{GOOD} {PATIENT} {IN_ORDER}"),
        ("FILE", f"{GOOD} {PATIENT} {IN_ORDER}"),  # a name with flags behind it would be the name of another file
        (f"{OWN} {PATIENT[:-5]}", f"{OWN} {PATIENT[:-5]}"),
    ],
)
def test_processes_start_their_collectives_in_one_order_and_wait_in_them(asked, tmp_path, monkeypatch, given, expected):
    (tmp_path / "flags").write_text(GOOD, encoding="utf-8")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given:
        monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags") if given == "FILE" else given)
    use_order(pytest.fail)
    assert os.environ["XLA_FLAGS"] == expected


def test_processes_say_when_there_is_no_such_order(monkeypatch):
    said = []
    monkeypatch.setenv("XLA_FLAGS", GOOD)
    monkeypatch.setattr("rlhfjax.host.cpus.refused", list)
    use_order(said.append)
    assert os.environ["XLA_FLAGS"] == GOOD
    assert IN_ORDER in said[0]
