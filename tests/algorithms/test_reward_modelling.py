"""The K-wise ranking loss through a decoder, against every pair taken by itself."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, ranked_batch, scalar_params_of, tiny

from rlhfjax.config import schema
from rlhfjax.models import LanguageModel
from rlhfjax.models.heads import apply_head
from rlhfjax.sharding import make_mesh
from rlhfjax.stages.objectives import reward_modelling
from rlhfjax.stages.reward import normalize_scores

MODEL = tiny("gpt2")
BATCH = ranked_batch(3, 4, 6, seed=1)
RANKS, PRESENT = np.asarray(BATCH.ranks), np.asarray(BATCH.mask)


def every_pair(params) -> jax.Array:
    """-log σ(r_w - r_l) of every pair, prompt by prompt; each candidate has its own forward pass."""
    rows = BATCH.tokens.reshape(-1, 6), BATCH.token_mask.reshape(-1, 6)
    scores = jax.lax.map(lambda row: MODEL.scores(params, row[0][None], row[1][None])[0], rows).reshape(3, 4)
    total, prompts = jnp.float32(0.0), 0
    for prompt in range(3):
        there = [k for k in range(4) if PRESENT[prompt, k]]
        losses = [
            -jax.nn.log_sigmoid(scores[prompt, w] - scores[prompt, l])
            for w in there
            for l in there  # noqa: E741
            if RANKS[prompt, w] < RANKS[prompt, l]
        ]
        total += sum(losses) / (len(there) * (len(there) - 1) / 2)
        prompts += 1
    return total / prompts


def test_the_batch_has_ties_and_absent_candidates():
    assert not PRESENT.all()
    assert any(len(set(ranks[there].tolist())) < there.sum() for ranks, there in zip(RANKS, PRESENT, strict=True))


def test_value_and_gradient_equal_the_pairs_one_by_one():
    # meant to catch pairs (and not prompts) of equal weight, and ties or absent candidates that count
    params, algorithm = scalar_params_of(MODEL, std=0.2), reward_modelling(MODEL, schema.RankingLoss())
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: algorithm.loss(p, BATCH, algorithm.weight(BATCH))[0]))(params)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(every_pair))(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert abs(float(loss) - np.log(2)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, wanted_gradient)


def test_one_forward_pass_a_candidate():
    # fails with a pass for each pair, C(4,2) x 2 rows per prompt
    calls = []

    def counted(self, params, tokens, *rest):
        calls.append(tokens.shape)
        return jnp.zeros((*tokens.shape, 16))

    with mock.patch.object(LanguageModel, "hidden", counted):
        algorithm = reward_modelling(MODEL, schema.RankingLoss())
        loss, metrics = algorithm.loss(scalar_params_of(MODEL), BATCH, algorithm.weight(BATCH))
    assert calls == [(12, 6)]
    assert metrics["train/rm/accuracy"] == 0.5  # all scores are equal
    assert loss == metrics["train/rm/loss"]


def test_weights_count_prompts_that_compare_and_pairs_that_differ():
    batch = ranked_batch(3, 3, 4)
    batch = type(batch)(
        batch.tokens,
        batch.token_mask,
        jnp.asarray([[1, 2, 2], [1, 1, 1], [1, 2, 3]], jnp.int32),
        jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool),
        batch.prompt_lengths,
    )
    weight = reward_modelling(MODEL, schema.RankingLoss()).weight(batch)
    assert (weight["prompts"], weight["pairs"]) == (2, 2)


def normalizing(scale):
    return schema.Reward.model_validate(
        {
            "data": [{"source": "unused"}],
            "steps": 1,
            "batch": {"size": 1, "length": 8},
            "optimizer": {"lr": 1e-3},
            "normalize": {"data": [{"source": "unused"}], "scale": scale, "count": 30},
        }
    )


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def test_scores_that_are_all_alike_are_not_scaled():
    """Nothing is divided by their deviation, which is rounding: a head of zeros keeps its kernel."""
    said = []
    reader = SimpleNamespace(demonstration_ids=lambda *_: [([1], [2, n]) for n in range(2, 6)])
    job = SimpleNamespace(
        config=normalizing(True),
        reader=reader,
        mesh=one_device(),
        tokenizer=SimpleNamespace(pad_id=0),
        report=said.append,
    )
    params = scalar_params_of(MODEL)
    params |= {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    after, facts = normalize_scores(job, MODEL, params)
    assert facts["normalized_gain"] == 1.0
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), after, params))
    assert "all alike" in said[0]


@pytest.mark.parametrize("scale", [False, True])
def test_scores_of_reference_responses_are_centred(scale):
    # meant to catch a bias that is centred before the gain is applied to it
    settings = normalizing(scale)
    rows = [random_tokens(n % 4 + 2, seed=n, low=1).tolist() for n in range(30)]
    pairs = [(row[:1], row[1:]) for row in rows]
    reader = SimpleNamespace(demonstration_ids=lambda data, length, count, refused: pairs[:count])
    job = SimpleNamespace(config=settings, reader=reader, mesh=one_device(), tokenizer=SimpleNamespace(pad_id=0))
    params = scalar_params_of(MODEL)
    after, facts = normalize_scores(job, MODEL, params)

    scores = np.zeros((2, 30))
    for i, some in enumerate((params, after)):
        for width in range(2, 6):
            group = [n for n, row in enumerate(rows) if len(row) == width]
            tokens = jnp.asarray([rows[n] for n in group], jnp.int32)
            scores[i, group] = jax.jit(MODEL.scores)(some, tokens, jnp.ones(tokens.shape, bool))
    spread = scores[0].std()
    np.testing.assert_allclose(scores[1], (scores[0] - scores[0].mean()) / (spread if scale else 1), atol=1e-5)
    assert facts["eval/rm/normalized_mean"] == pytest.approx(0, abs=1e-5)
    assert facts["eval/rm/normalized_std"] == pytest.approx(1 if scale else spread, rel=1e-4)
    assert facts["normalized_on"] == "30 demonstrations"
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params["decoder"], after["decoder"])
    assert all(jax.tree.leaves(same))
    assert apply_head(after["head"], jnp.zeros((1, 16))).dtype == jnp.float32
