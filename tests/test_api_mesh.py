"""A model that `rlhfjax.load` lays out over several devices says what it says on one, and is whole on none."""

import jax
import numpy as np
import pytest
from tiny import params_of, scalar_params_of

import rlhfjax
from rlhfjax.api import loading
from rlhfjax.errors import ConfigError
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.training.checkpoint import meta_of, save_model

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
WHOLE = 4096  # bytes of what may be whole on every device: norms


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    sizes = {"vocab_size": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
    model, made = LanguageModel(decoder_config("llama", **sizes)), {}
    for role, params in {"policy": params_of(model), "reward": scalar_params_of(model)}.items():
        made[role] = tmp_path_factory.mktemp(role) / "0"
        save_model(made[role], role, params, meta_of(role, model, None))
    return made


def split(model):
    """Whether no parameter but small ones lies whole on a device."""
    leaves = jax.tree.leaves(model.params)
    return all(leaf.nbytes <= WHOLE or leaf.addressable_shards[0].data.nbytes < leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_it_says_the_same_on_several_devices(checkpoints, mesh):
    alone, spread = rlhfjax.load(checkpoints["policy"]), rlhfjax.load(checkpoints["policy"], mesh=mesh)
    assert split(spread)
    assert not split(alone)
    tokens = np.arange(24).reshape(4, 6)
    np.testing.assert_allclose(spread.logits(tokens), alone.logits(tokens), rtol=1e-4, atol=1e-4)
    one, other = (m.generate(PROMPTS, max_new_tokens=6, temperature=0.0, stop_ids=(1,)) for m in (alone, spread))
    assert [[c.tokens for c in each] for each in one] == [[c.tokens for c in each] for each in other]


def test_scores_are_the_same_for_any_number_of_rows(checkpoints):
    alone, spread = rlhfjax.load(checkpoints["reward"]), rlhfjax.load(checkpoints["reward"], mesh={"fsdp": 4})
    assert split(spread)
    responses = [[20, 21], [22], [23, 24, 25]]
    np.testing.assert_allclose(spread.score(PROMPTS, responses), alone.score(PROMPTS, responses), rtol=1e-4, atol=1e-5)


def test_a_model_without_room_on_one_device_takes_all(checkpoints, monkeypatch):
    monkeypatch.setattr(loading, "_fits", lambda step_dir, device: False)
    model = rlhfjax.load(checkpoints["policy"])
    assert model.mesh.shape["fsdp"] == len(jax.local_devices()) > 1
    assert split(model)


def test_axes_that_there_are_not_are_named(checkpoints):
    with pytest.raises(ConfigError, match=r"mesh: expected sizes of data, fsdp, .*, got 'rows'"):
        rlhfjax.load(checkpoints["policy"], mesh={"rows": 2})
