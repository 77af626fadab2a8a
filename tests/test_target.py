"""One function under several targets on one machine: other programs, none mixed up, and what was before comes back."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.sharding import make_mesh
from rlhfjax.target import SIZES, building_for, current, machine, target_of

CHIP = SimpleNamespace(platform="tpu")
HOPPER = SimpleNamespace(platform="cuda", compute_capability="9.0")
INSTINCT = SimpleNamespace(platform="rocm", compute_capability="gfx942")


def test_a_cpu_has_sixteen_rows_a_device_and_a_block_a_core():
    cores = len(os.sched_getaffinity(0))
    one, four = (target_of(make_mesh(devices=jax.devices()[:count])) for count in (1, 4))
    assert (one.platform, one.slots, one.blocks, one.capability) == ("cpu", 16, min(cores, 16), None)
    assert (four.slots, four.blocks) == (64, max(1, min(cores // 4, 16)))
    assert (one.part_tokens, one.most_parts, one.chunk_bytes, one.unrolled_layers) == (512, 0, 8 * 2**20, 8)


@pytest.mark.parametrize(
    ("device", "platform", "capability"), [(CHIP, "tpu", None), (HOPPER, "gpu", 9.0), (INSTINCT, "gpu", None)]
)
def test_devices_that_are_not_here_are_a_target(device, platform, capability):
    target = target_of([device] * 8)
    assert (target.platform, target.capability) == (platform, capability)
    assert (target.slots, target.blocks) == (256 * 8, 1)
    assert (target.part_tokens, target.most_parts, target.chunk_bytes, target.unrolled_layers) == (8192, 4, 2**28, 0)


def test_sizes_that_are_given_stand_in_the_place_of_the_machines():
    target = target_of(sizes={"slots": 3, "blocks": None, "unrolled_layers": 0})
    assert target == replace(machine(), slots=3, unrolled_layers=0)
    with pytest.raises(ValueError, match=r"expected sizes among slots, .*, got rows"):
        target_of(sizes={"rows": 3})


def test_facts_are_plain_and_name_every_size():
    facts = target_of([HOPPER]).facts()
    assert set(facts) == {"platform", "capability", *SIZES}
    assert {type(facts[name]) for name in SIZES} == {int}


def test_outside_of_a_build_it_is_the_machines_own():
    own, other = machine(), target_of([CHIP])
    assert current() == own == target_of()
    with building_for(other):
        assert current() == other
        with building_for(own):
            assert current() == own
        assert current() == other
    with pytest.raises(ZeroDivisionError), building_for(other):
        raise ZeroDivisionError
    assert current() == own


def test_another_thread_builds_for_the_machine_until_it_is_given_a_target():
    def given(target):
        with building_for(target):
            return current()

    with ThreadPoolExecutor(1) as pool, building_for(target_of([CHIP])):
        assert pool.submit(current).result() == machine()
        assert pool.submit(given, current()).result() == current()


# fails with a list of the process in the place of jax's context: seen
def test_programs_of_several_targets_are_kept_apart():
    traced = []

    @jax.jit
    def inner(x):
        traced.append(current().blocks)
        return x * current().blocks

    outer = jax.jit(lambda x: inner(x) + 1)
    x, two, three = jnp.float32(10), *(replace(machine(), blocks=count) for count in (12, 13))

    def called(target):
        with building_for(target):
            return float(outer(x))

    assert [called(two), called(three), called(two)] == [121, 131, 121]
    assert traced == [12, 13]
    assert float(outer(x)) == called(machine()) == 10 * machine().blocks + 1
    assert traced == [12, 13, machine().blocks]  # inside and outside it is one program
