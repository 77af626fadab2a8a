"""Groups of responses that lie on several devices: GRPO and RLOO on every mesh are those of loops in float64.

The pretraining mix is in the gradient, as its coefficient times a mean over targets.
"""

import jax
import numpy as np
import pytest

from rlhfjax.sharding import make_mesh
from sharding.groups import by_loops, on_mesh

# On eight rows of devices a group of four responses is on two of them.
MESHES = {"one": (), "data 8": (8,), "2 x 2 x 2": (2, 2, 1, 2), "sequence 2": (2, 1, 2, 2), "expert 2": (2, 2, 1, 1, 2)}


@pytest.fixture(scope="module")
def wanted():
    return by_loops()


def assert_as_by_loops(found, wanted):
    """Of two algorithms: float32 against float64, the gradient against differences."""
    assert found.keys() == wanted.keys() == {"grpo", "rloo"}
    for name, expected in wanted.items():
        np.testing.assert_allclose(found[name]["advantages"], expected["advantages"], atol=1e-5, err_msg=name)
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=2e-5, abs=1e-6), name
        assert np.abs(expected["gradient"]).max() > 0.01  # far above what is tolerated
        np.testing.assert_allclose(found[name]["gradient"], expected["gradient"], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_advantages_loss_and_gradient_are_those_of_loops_on_every_mesh(mesh, wanted):
    # meant to catch a mean per device, groups of rows that are not neighbours, and a response that is cut in two
    sizes = MESHES[mesh]
    devices = jax.devices()[: int(np.prod(sizes, dtype=int))]
    assert_as_by_loops(on_mesh(make_mesh(*sizes, devices=devices)), wanted)
