"""The mesh takes what is there, or says in numbers why it cannot."""

import jax
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.sharding import make_mesh


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2, 1)),
        ({"data": 1, "sequence": -1}, (1, 1, 8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 1, 1, 4)),
    ],
)
def test_axes(axes, shape):
    mesh = make_mesh(**axes)
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor", "expert")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    mesh = make_mesh(data=2, devices=jax.devices()[4:6])
    assert set(mesh.devices.flat) == set(jax.devices()[4:6])


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": 16}, {"data": -1, "tensor": 16}])
def test_a_product_that_does_not_fit_is_an_error(axes):
    with pytest.raises(ConfigError, match=r"product of 8 .*data .*fsdp .*sequence .*tensor .*mesh"):
        make_mesh(**axes)


def test_slices_split_the_data_axis_first():
    mesh = make_mesh(fsdp=4, slices=2)
    assert mesh.devices.shape == (2, 4, 1, 1, 1)
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()]
    with pytest.raises(ConfigError, match=r"mesh.data 2 must be a multiple of mesh.slices 4"):
        make_mesh(data=2, fsdp=4, slices=4)
