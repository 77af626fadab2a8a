"""Meshes of TPUs that are not here: along the links between them where that goes, across them else, over slices."""

import importlib.util

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.sharding import make_mesh

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'rlhfjax[tpu]'"
)


@pytest.fixture
def chips(monkeypatch):
    """The devices of a topology, of several slices of it."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")

    def described(name, slices=1):
        several = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices

    return described


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}),
        ("v5p:4x4x4", {"fsdp": 32, "tensor": 2}),
        ("v5p:4x4x4", {"data": 2, "fsdp": 8, "tensor": 4}),
        ("v5p:4x4x4", {"fsdp": 8, "expert": 8}),
        ("v6e:16x16", {"fsdp": 64, "tensor": 4}),
        ("v5p:8x8x8", {"data": 2, "fsdp": 32, "tensor": 8}),
    ],
)
def test_axes_that_no_link_follows_are_laid_across_several(chips, topology, axes):
    mesh = make_mesh(**axes, devices=chips(topology))
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == axes
    assert len({device.id for device in mesh.devices.flat}) == mesh.size


def test_only_data_crosses_slices(chips):
    devices = chips("v5p:4x4x4", 2)
    mesh = make_mesh(data=4, fsdp=16, tensor=2, slices=2, devices=devices)
    for index, part in enumerate((mesh.devices[:2], mesh.devices[2:])):
        assert {device.slice_index for device in part.flat} == {index}
    with pytest.raises(ConfigError, match=r"mesh.slices: expected 2, as these 128 devices are in, got 1"):
        make_mesh(fsdp=128, devices=devices)
