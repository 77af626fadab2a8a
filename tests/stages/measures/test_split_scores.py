"""Scores that several devices share: each computes some of the rows, and they are those of one device."""

from types import SimpleNamespace

import jax
import numpy as np
from tiny import scalar_params_of

from rlhfjax.config import schema
from rlhfjax.layout import laid_out_by
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.sharding import state_shardings
from rlhfjax.sharding.activations import layout_of
from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.stages.measures import reward_scores
from rlhfjax.stages.measures.reward_scores import RewardScorer
from rlhfjax.stages.reward import normalize_scores

PAIRS = [(tuple(range(5, 7 + i % 4)), tuple(range(20, 22 + i % 7))) for i in range(28)]


class Ids:
    eos_id, pad_id = 1, 0


def test_rows_are_split_and_scores_stay_what_they_are(monkeypatch):
    # fails when rows are whole on every device: seen
    sizes = {"vocab_size": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
    model = LanguageModel(decoder_config("llama", **sizes))
    params, mesh = scalar_params_of(model), make_mesh(2, 2, devices=jax.devices()[:4])
    prompts, responses = zip(*PAIRS, strict=True)
    wanted = RewardScorer(model, params, Ids())(list(prompts), list(responses))
    placed, shapes = [], set()
    put = reward_scores.put
    monkeypatch.setattr(reward_scores, "put", lambda *given: placed.append(put(*given)) or placed[-1])
    laid = jax.device_put(params, state_shardings(mesh, params))
    scorer = RewardScorer(model, laid, Ids(), mesh=mesh)
    read = type(model).hidden

    def rows(self, params, tokens, *others, **named):
        shapes.add(tokens.shape[0])
        return read(self, params, tokens, *others, **named)

    monkeypatch.setattr(type(model), "hidden", rows)
    with laid_out_by(layout_of(mesh)):
        found = scorer(list(prompts), list(responses))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(shard.data.shape[0] == 16 for array in placed for shard in array.addressable_shards)
    assert shapes == {64}  # which the four devices divide


def test_the_head_is_centred_and_scaled_on_a_mesh_as_on_one_device():
    data = [{"source": "unused"}]
    normalize = {"on": "demonstrations", "scale": True, "data": data}
    given = {"data": data, "steps": 1, "batch": {"size": 4, "length": 16}, "optimizer": {"lr": 1e-3}}
    reward = schema.Reward.model_validate(given | {"normalize": normalize})
    model = LanguageModel(decoder_config("llama", vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, context=64))
    params = scalar_params_of(model)
    found = []
    for mesh in (make_mesh(1, devices=jax.devices()[:1]), make_mesh(2, 2, tensor=2)):
        laid = jax.device_put(params, state_shardings(mesh, params))
        pairs = [(list(prompt), list(response)) for prompt, response in PAIRS]
        reader = SimpleNamespace(demonstration_ids=lambda *asked, pairs=pairs: pairs)
        job = SimpleNamespace(config=reward, mesh=mesh, tokenizer=Ids(), reader=reader, report=print)
        with laid_out_by(layout_of(mesh)):
            found.append(normalize_scores(job, model, laid))
    (one, facts), (split, same) = found
    for leaf, wanted in zip(jax.tree.leaves(split["head"]), jax.tree.leaves(one["head"]), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5)  # products are summed in another order
    np.testing.assert_allclose(same["normalized_gain"], facts["normalized_gain"], rtol=1e-4)
    assert abs(same["eval/rm/normalized_mean"]) < 1e-5
    assert abs(same["eval/rm/normalized_std"] - 1) < 1e-4
