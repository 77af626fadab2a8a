"""The shipped presets build their shapes; nothing is allocated."""

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.stages.models import new_model


# Brown et al. 2020, table 2.1, prints 1.3, 6.7 and 175.0 billion; 1.3B and 175B count within a percent and a half.
@pytest.mark.parametrize(
    ("name", "billions"), [("instructgpt_1b3", 1.3), ("instructgpt_6b", 6.7), ("instructgpt_175b", 175.0)]
)
def test_instructgpt_presets_build_the_shapes_of_gpt3(name, billions):
    run = load_config(name)
    model = new_model(run.model, run.tokenizer.vocab_size)
    policy = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(policy)) == pytest.approx(billions * 1e9, rel=0.015)
    scalar = jax.eval_shape(model.init_scalar, jax.random.key(0))
    assert scalar["head"]["kernel"].shape == (run.model.width,)
    shardings = state_shardings(make_mesh(devices=jax.devices()[:1]), {"policy": policy, "value": scalar})
    assert jax.tree.structure(shardings) == jax.tree.structure({"policy": policy, "value": scalar})
