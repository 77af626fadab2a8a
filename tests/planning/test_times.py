"""Seconds of a loop, worked by hand from published peaks."""

import pytest

from rlhfjax.planning.chips import CHIPS
from rlhfjax.planning.times import LATENCY, REACHED, rate, reckoned_by_compiler, seconds_of
from rlhfjax.planning.topology import of_cpu, parsed

V5P, H100 = parsed("v5p:4x4x4", 1), parsed("h100:2x8", 1)


def loop(**given):
    return {"times": 1, "flops": 0.0, "kernels": 0.0, "moved": 0.0, "cycles": 0.0, "sent": [], "between": 0.0} | given


def seconds(machine, *loops):
    return seconds_of({"loops": loops}, machine, machine.chip)


def test_the_least_is_the_slowest_part_and_the_most_all_of_them():
    # 459 TFLOP/s and 2.765 TB/s of a v5p: half a second of products, a tenth of memory, three times.
    found = seconds(V5P, loop(times=3, flops=0.5 * 459e12, moved=0.2765e12))
    assert found.least == pytest.approx(1.5)
    assert found.most == pytest.approx(1.5 / REACHED)
    assert found.expected == pytest.approx((found.least + found.most) / 2)


def test_cycles_of_the_compiler_stand_in_the_place_of_peaks():
    found = seconds(V5P, loop(cycles=1.75e9, kernels=0.459e12 * REACHED))
    assert found.most == pytest.approx(1.0 + 1e-3)  # a second at 1.75 GHz, a millisecond of kernels
    assert reckoned_by_compiler({"cycles": 3.5e9}, CHIPS["v5p"]) == pytest.approx(2.0)
    assert reckoned_by_compiler({"cycles": 0}, CHIPS["h100"]) is None


def test_rings_on_a_torus_have_their_part_of_the_links():
    links = 4800e9 / 8
    assert rate(64, V5P, V5P.chip) == links  # the whole slice
    assert rate(8, V5P, V5P.chip) == pytest.approx(links / 2)  # 8 of 64: half of the axes by their logarithm
    assert rate(2, V5P, V5P.chip) == pytest.approx(links / 3)  # one axis at least
    found = seconds(V5P, loop(sent=[[8, links / 2, 5]]))
    assert (found.least, found.most) == (pytest.approx(1.0), pytest.approx(1.0 + 5 * LATENCY))


def test_gpus_of_one_host_have_their_switch_and_others_the_network():
    assert (rate(8, H100, H100.chip), rate(16, H100, H100.chip)) == (450e9, 50e9)
    assert seconds(H100, loop(sent=[[16, 100e9, 1]])).least == pytest.approx(2.0)
    assert seconds(H100, loop(between=50e9)).least == pytest.approx(1.0)


def test_machines_are_counted_in_devices_and_hosts():
    assert (V5P.devices, V5P.hosts) == (64, 16)
    assert (H100.devices, H100.hosts) == (16, 2)
    tpu7x, slices = parsed("tpu7x:4x4x8", 1), parsed("v5p:4x4x8", 2)
    assert (tpu7x.chips, tpu7x.devices, tpu7x.hosts) == (128, 256, 32)  # two devices a chip, four chips a host
    assert (slices.devices, slices.hosts, slices.name) == (256, 64, "2 x v5p:4x4x8")
    assert (of_cpu(3).devices, of_cpu(3).hosts) == (3, 1)
