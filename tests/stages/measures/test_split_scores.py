"""Scores that several devices share: each computes some of the rows, and they are those of one device."""

import jax
import numpy as np
from tiny import scalar_params_of

from rlhfjax.layout import laid_out_by
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.sharding import state_shardings
from rlhfjax.sharding.activations import layout_of
from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.stages.measures import reward_scores
from rlhfjax.stages.measures.reward_scores import RewardScorer

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
