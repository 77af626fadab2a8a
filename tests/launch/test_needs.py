"""What a launch file asks for: from a plan, or counted by hand."""

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.launch.needs import CHIPS, Needs, of_plan, of_topology

PLANNED = {
    "platform": "tpu", "topology": "v5p:4x4x4", "slices": 2, "devices": 128, "hosts": 32, "devices_per_host": 4,
    "grace_s": 90, "host_memory_bytes": 200_000_000_000, "disk_bytes": 10**12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("topology", "nodes", "slices", "hosts", "devices", "named"),
    [
        ("v5p:4x4x4", None, 1, 16, 64, "v5p-128"),  # four chips to a host, cores counted in the name
        ("v5p:2x2x1", None, 1, 1, 4, "v5p-8"),
        ("v4:2x2x2", None, 3, 6, 24, "v4-16"),
        ("v5e:4x8", None, 1, 8, 32, "v5litepod-32"),
        ("v6e:16x16", None, 2, 128, 512, "v6e-256"),
        ("v6e:1x1", None, 1, 1, 1, "v6e-1"),
        ("tpu7x:2x2x2", None, 1, 2, 16, "tpu7x-16"),  # two devices to a chip
        ("h100:8", 4, 1, 4, 32, "h100"),
        ("h100:4x8", None, 1, 4, 32, "h100"),
        ("cpu:2", 3, 1, 3, 6, "cpu"),
        ("cpu", 3, 1, 3, 3, "cpu"),
    ],
)
def test_hosts_and_devices_are_those_counted_by_hand(topology, nodes, slices, hosts, devices, named):
    needs = of_topology(topology, nodes, slices)
    assert (needs.hosts, needs.devices, needs.accelerator_type) == (hosts, devices, named)
    assert (needs.hosts_per_slice, needs.host_memory_bytes, needs.disk_bytes) == (hosts // slices, 0, 0)
    if needs.platform == "tpu":
        assert needs.chips_per_host == min(4, devices // CHIPS[topology.partition(":")[0]].devices)


@pytest.mark.parametrize(
    ("topology", "nodes", "slices", "said"),
    [
        ("v5p:4x4x4", 8, 1, "--nodes: expected 16"),
        ("v5p:4x4", None, 1, "expected 3 sides of v5p"),
        ("v5p:4x4x", None, 1, "expected KIND:AxBxC"),
        ("v6e:3x3", None, 1, "expected a multiple of 4 chips"),
        ("h100:8", None, 1, "--nodes: expected the number"),
        ("h100:8", 2, 2, "--slices: expected 1"),
        ("h100:4x8", 2, 1, "--nodes: expected 4, which h100:4x8 has"),
        ("h100", 2, 1, "--topology: expected"),
        ("h100:eight", 2, 1, "--topology: expected"),
        ("H100;rm:8", 2, 1, "--topology: expected"),
    ],
)
def test_numbers_that_do_not_fit_are_named(topology, nodes, slices, said):
    with pytest.raises(ConfigError, match=said):
        of_topology(topology, nodes, slices)


def test_a_plan_says_what_is_needed():
    assert of_plan({"fits": True, "needs": PLANNED}) == Needs(**PLANNED)


@pytest.mark.parametrize(
    ("remedies", "said"),
    [
        ([{"overrides": ["mesh.fsdp=16", "mesh.data=4"], "said": "80 GB a device", "peak": 1}, {}],
         "\n  give mesh.fsdp=16 mesh.data=4: 80 GB a device"),
        ([], ""),
    ],
)  # fmt: skip
def test_what_a_plan_refuses_is_refused_with_its_reason_and_remedy(remedies, said):
    plan = {"fits": False, "reasons": ["ppo/update takes 120 GB of 95", "x"], "remedies": remedies, "needs": PLANNED}
    with pytest.raises(ConfigError) as refused:
        of_plan(plan)
    assert str(refused.value) == "the plan does not fit: ppo/update takes 120 GB of 95" + said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"platform": "npu"}, "needs.platform: expected tpu, gpu, cpu"),
        ({"devices": 127}, "needs.devices: expected hosts x devices_per_host = 128"),
        ({"devices": 64, "hosts": 16}, "needs.devices: expected 128, which 2 x v5p:4x4x4 are"),
        ({"slices": 3}, "needs.hosts: expected a multiple of slices, 3"),
        ({"grace_s": 0}, "needs.grace_s: expected a whole number, 1 or more, got 0"),
        ({"grace_s": 1.5}, "needs.grace_s: expected a whole number"),
        ({"hosts": True}, "needs.hosts: expected a whole number"),
        ({"disk_bytes": -1}, "needs.disk_bytes: expected a whole number, 0 or more"),
        ({"platform": "gpu"}, "needs.slices: expected 1 without TPUs"),
        ({"platform": "gpu", "slices": 1}, "needs.topology: expected KIND:HOSTSxN"),
        ({"platform": "gpu", "slices": 1, "topology": "h100:8\nx"}, "needs.topology: expected KIND:HOSTSxN"),
        (
            {"platform": "gpu", "slices": 1, "topology": "h100:8x8"},
            "needs.devices: expected 64, which 1 x h100:8x8 are",
        ),
        ({"more": 1}, "needs: more: expected"),
    ],
)
def test_a_plan_that_makes_no_sense_is_an_error(change, said):
    with pytest.raises(ConfigError, match=said):
        of_plan({"fits": True, "needs": PLANNED | change})


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"needs": PLANNED}, "it does not say why"),
        ({"fits": True}, "expected an object with platform"),
        ({"fits": True, "needs": {"platform": "tpu"}}, "expected topology, slices"),
    ],
)
def test_a_plan_that_lacks_something_is_an_error(plan, said):
    with pytest.raises(ConfigError, match=said):
        of_plan(plan)
