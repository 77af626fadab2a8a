"""Which sizes an attempt has: the configuration's, those that the run had before, the machine's."""

from types import SimpleNamespace

import jax
import pytest

from rlhfjax.config.upkeep import Reliability, Sizes
from rlhfjax.runs.manifest import other_layout
from rlhfjax.runs.sizes import agree_on_sizes, first_target, next_target
from rlhfjax.sharding import make_mesh
from rlhfjax.target import SIZES, target_of

ONE = make_mesh(devices=jax.devices()[:1])
OWN = target_of(ONE)
ELSEWHERE = {"blocks": OWN.blocks + 3, "slots": 5}


def attempt(devices: int = 1, **facts) -> dict:
    """The line of an attempt on another machine."""
    return {"target": OWN.facts() | ELSEWHERE | facts, "devices": ["cpu"] * devices}


def target_after(before, stage="sft", **sizes):
    """The target of the next attempt, and what it reports."""
    said = []
    run = SimpleNamespace(reliability=Reliability(sizes=Sizes(**sizes)))
    job = SimpleNamespace(run=run, stage=stage, mesh=ONE, report=said.append)
    return next_target(job, before), said


def test_the_configuration_names_every_size_and_leaves_all_of_them_open():
    assert tuple(Sizes.model_fields) == SIZES
    assert set(Sizes().model_dump().values()) == {None}
    run = SimpleNamespace(reliability=Reliability(sizes=Sizes(**dict.fromkeys(SIZES, 3))))
    assert {getattr(first_target(run, ONE), name) for name in SIZES} == {3}


def test_a_run_that_begins_has_the_sizes_of_the_machine():
    assert target_after([]) == (OWN, [])
    assert target_after([attempt()], stage="tokenizer") == (OWN, [])  # again from the start, on this machine
    assert target_after([{"devices": ["cpu"]}]) == (OWN, [])  # an older version, or killed before it noted any


def test_a_run_that_goes_on_keeps_its_sizes_and_says_so():
    killed = {"devices": ["cpu"]}
    target, [line] = target_after([attempt(slots=7), attempt(), killed])
    assert target.facts() == OWN.facts() | ELSEWHERE
    assert line == (
        f"sft: continues with the sizes of the run: slots 5 (this machine's own: {OWN.slots}), blocks {OWN.blocks + 3} "
        f"(this machine's own: {OWN.blocks}); reliability.sizes sets others"
    )


def test_what_the_configuration_sets_is_not_kept():
    target, [line] = target_after([attempt()], slots=16, most_parts=2)
    assert target.facts() == OWN.facts() | ELSEWHERE | {"slots": 16, "most_parts": 2}
    assert "slots" not in line


@pytest.mark.parametrize("other", [attempt(devices=2), attempt(platform="gpu")], ids=["devices", "platform"])
def test_on_another_layout_the_machine_decides_anew(other):
    assert target_after([other]) == (OWN, [])


def test_other_sizes_than_before_are_said():
    now = {"resumed_from": {"stage": "sft"}, "target": OWN.facts()}
    assert other_layout([{"target": OWN.facts()}], now) is None
    assert other_layout([{}], now) is None
    changed = [{"target": OWN.facts() | {"slots": 5, "chunk_bytes": 64}}]
    assert other_layout(changed, now) == f"with other sizes (slots 5 -> {OWN.slots}, chunk_bytes 64 -> {2**23})"


def test_processes_compare_their_sizes(monkeypatch):
    compared = {}
    monkeypatch.setattr("rlhfjax.host.processes.agree", compared.update)
    agree_on_sizes(OWN)
    assert compared.keys() == {f"reliability.sizes.{name}" for name in SIZES}
    assert compared["reliability.sizes.blocks"] == str(OWN.blocks)
