"""Several models of one server."""

import jax
from tiny import params_of

import rlhfjax
from rlhfjax.cli.serving import _loaded
from rlhfjax.models.lora import init_lora, split
from rlhfjax.training.checkpoint import meta_of, reference_to, save_model

from .conftest import NETWORK


def test_models_with_adapters_over_one_base_share_its_arrays(tmp_path):
    params = params_of(NETWORK)
    base = tmp_path / "base" / "checkpoints" / "1"
    base.parent.mkdir(parents=True)
    save_model(base, "policy", params, meta_of("policy", NETWORK, None))
    for seed, stage in enumerate(("sft", "ppo")):
        adapters = init_lora(jax.random.key(seed), params, 2, ["attention"])
        lora = {"rank": 2, "alpha": 4.0, "targets": ["attention"]}
        lineage = {"lora": lora, "base": reference_to(base, tmp_path / stage)}
        place = tmp_path / stage / "checkpoints" / "1"
        place.parent.mkdir(parents=True)
        save_model(place, "policy", adapters, meta_of("policy", NETWORK, None, **lineage))
    named = {name: str(tmp_path / name) for name in ("sft", "ppo", "base")}
    models = _loaded(named, lambda path, bases: rlhfjax.load(path, bases=bases))
    (one, ours), (other, theirs) = (split(models[name].params) for name in ("sft", "ppo"))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, one, other))
    assert not any(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, ours, theirs)))
    whole = dict(jax.tree_util.tree_leaves_with_path(models["base"].params))
    assert all(leaf is whole[path] for path, leaf in jax.tree_util.tree_leaves_with_path(one))
