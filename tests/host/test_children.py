"""Calls in processes of their own, of functions of Python that end in every way."""

import resource
import signal

import pytest

from rlhfjax.host.children import STACK, call


def test_what_returns_gives_its_value_and_what_it_used():
    ended = call("operator:add", [[1, "two"], [None, 4.5]])
    assert ended.returned
    assert ended.value == [1, "two", None, 4.5]
    assert ended.cpu_seconds > 0
    assert ended.memory > 2**20


def test_an_exception_is_an_exit_code_and_its_last_line():
    ended = call("operator:truediv", [1, 0])
    assert (ended.how, ended.value) == ("exit 1", None)
    assert ended.said.splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_death_has_the_name_of_its_signal(name):
    ended = call("signal:raise_signal", [int(getattr(signal, name))])
    assert not ended.returned
    assert ended.how == name


def test_what_takes_too_long_is_ended():
    # without the limit this would end by itself, after ten minutes
    assert call("time:sleep", [600], seconds=0.5).how == "too long"


def test_threads_have_room_for_deep_calls():
    soft, hard = call("resource:getrlimit", [resource.RLIMIT_STACK]).value
    allowed = STACK * 1024 if hard == resource.RLIM_INFINITY else min(STACK * 1024, hard)
    assert soft in (allowed, resource.getrlimit(resource.RLIMIT_STACK)[0])
    assert hard != resource.RLIM_INFINITY or soft == STACK * 1024


def test_variables_are_added(monkeypatch):
    monkeypatch.setenv("OF_THE_PARENT", "kept")
    assert call("os:getenv", ["OF_THE_PARENT"], environment={"OWN": "given"}).value == "kept"
    assert call("os:getenv", ["OWN"], environment={"OWN": "given"}).value == "given"
