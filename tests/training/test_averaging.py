"""The moving average against sums worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.training.averaging import handed_on, moved_average, newest_weight
from rlhfjax.types import TrainState


def test_three_updates_by_hand():
    """p = 1, 4, 10 and d = ½: 1, then (½·1 + 4) / 1.5 = 3, then (¼·1 + ½·4 + 10) / 1.75 = 7. It began with 99."""
    average, found = {"kernel": jnp.float32(99.0)}, []
    for count, value in enumerate((1.0, 4.0, 10.0), 1):
        average = moved_average(average, {"kernel": jnp.float32(value)}, 0.5, count)
        found.append(float(average["kernel"]))
    assert found == pytest.approx([1.0, 3.0, 7.0], rel=1e-6)


@pytest.mark.parametrize(("decay", "count"), [(0.9999, 1), (0.9999, 2), (0.9999, 30_000), (0.5, 3), (0.0, 1), (0.0, 7)])
def test_weight_of_the_newest(decay, count):
    # 1 / (1 + d + … + d^(n-1)). Fails where 1 - d^n cancels: at d = 0.9999 and n = 2 that costs three digits
    expected = 1.0 / sum(decay**i for i in range(count))
    np.testing.assert_allclose(jax.jit(newest_weight, static_argnums=0)(decay, count), expected, rtol=1e-5)


def test_the_first_update_leaves_nothing_of_the_beginning():
    rng = np.random.default_rng(0)
    before, after = (jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(2))
    np.testing.assert_array_equal(moved_average({"x": before}, {"x": after}, 0.999, 1)["x"], after)  # to the bit


def test_parameters_keep_their_type():
    tree = {"x": jnp.ones(3, jnp.bfloat16)}
    assert moved_average(tree, tree, 0.9, 4)["x"].dtype == jnp.bfloat16


def test_what_is_handed_on():
    assert handed_on(TrainState("params", None, jnp.int32(0))) == "params"
    assert handed_on(TrainState("params", None, jnp.int32(0), "average")) == "average"
