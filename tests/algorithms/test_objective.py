"""An algorithm on some of its parameters says what it says of all of them."""

import jax.numpy as jnp
import pytest

from rlhfjax.algorithms import Mix, restrict
from rlhfjax.algorithms.language_modelling import LanguageModelling


def test_both_parts_of_a_mix_see_the_whole():
    sums = [lambda params, batch, key, power=power: params["own"] * params["frozen"] ** power for power in (1, 2)]
    mix = restrict(
        Mix(LanguageModelling(sums[0]), 27.8, LanguageModelling(sums[1])), lambda own: {"own": own, "frozen": 3.0}
    )
    assert mix.coef == 27.8
    losses = [part.loss(jnp.float32(5.0), None, jnp.float32(2.0))[0] for part in (mix.first, mix.second)]
    assert [float(loss) for loss in losses] == pytest.approx([5 * 3 / 2, 5 * 9 / 2])
