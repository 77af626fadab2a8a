"""What heads learn: which tokens are their targets, and what the loss says of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from tiny import params_of, tiny, token_batch

from rlhfjax.algorithms.multi_token import MultiTokenPrediction, Sums, targets_ahead
from rlhfjax.stages.objectives import training_loss
from rlhfjax.types import TokenBatch

# two documents of 4 and 3 tokens, and padding; the first token of each is no target
ROW = TokenBatch(
    jnp.asarray([[1, 5, 7, 2, 1, 9, 2, 0]], jnp.int32),
    jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]], jnp.int32),
    jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0]], jnp.int32),
    jnp.asarray([[False, True, True, True, False, True, True, False]]),
)


def test_targets_stay_in_their_document():
    # meant to catch targets that wrap around the row, of the next document, and of padding
    for distance, wanted in (
        (1, [5, 7, 2, 0, 9, 2, 0, 0]),
        (2, [7, 2, 0, 0, 2, 0, 0, 0]),
        (3, [2, 0, 0, 0, 0, 0, 0, 0]),
    ):
        tokens, mask = targets_ahead(ROW, distance)
        assert jnp.where(mask, tokens, 0)[0].tolist() == wanted
    one = replace(ROW, segments=jnp.ones_like(ROW.segments), loss_mask=jnp.ones_like(ROW.loss_mask))
    assert targets_ahead(one, 3)[1][0].tolist() == [True] * 5 + [False] * 3


def test_every_term_has_its_own_mean():
    algorithm = MultiTokenPrediction(lambda *_: Sums(jnp.float32(10.0), jnp.asarray([6.0, 5.0]), jnp.ones(2)), 2, 0.5)
    weight = algorithm.weight(ROW)
    assert (weight["targets"], weight["ahead"].tolist()) == (5, [3, 1])
    loss, metrics = algorithm.loss({}, ROW, weight)
    assert loss == 2.0 + 0.5 * (2.0 + 5.0) / 2
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss/train": 2.0,
        "mtp/loss/1": 2.0,
        "mtp/loss/2": 5.0,
        "mtp/hit_rate/1": np.float32(1 / 3),
        "mtp/hit_rate/2": 1.0,
    }


def test_loss_of_a_decoder_is_that_of_loops():
    """Against log-probabilities of whole rows, one target after the other."""
    model = tiny(mtp_heads=2, mtp_coef=0.7)
    params, batch = params_of(model, seed=1), token_batch(4, 9)
    algorithm = training_loss(model, ahead=True)
    weight = algorithm.weight(batch)
    loss, metrics = jax.jit(algorithm.loss)(params, batch, weight)

    @jax.jit
    def logits(params):
        hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
        return model.unembed(params, jnp.concatenate([hidden[None], model.ahead(params, hidden)]))

    log_p = np.asarray(jax.nn.log_softmax(logits(params)), np.float64)
    means, rates = [], []
    for n in range(3):
        said, hits = [], []
        for row in range(4):
            for slot in range(9 - n - 1):
                end = slot + n + 1
                if batch.loss_mask[row, end] and batch.segments[row, slot] == batch.segments[row, end]:
                    token = int(batch.tokens[row, end])
                    said.append(-log_p[n, row, slot, token])
                    hits.append(log_p[n, row, slot].argmax() == token)
        means.append(np.mean(said))
        rates.append(np.mean(hits))
    np.testing.assert_allclose(loss, means[0] + 0.7 * np.mean(means[1:]), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/train"], means[0], rtol=1e-5)
    np.testing.assert_allclose([metrics[f"mtp/loss/{n}"] for n in (1, 2)], means[1:], rtol=1e-5)
    np.testing.assert_allclose([metrics[f"mtp/hit_rate/{n}"] for n in (1, 2)], rates[1:], rtol=1e-5)
    assert np.ptp(means) > 0.01


def test_parts_add_up_and_heads_learn():
    model = tiny(mtp_heads=2)
    params, batch = params_of(model, seed=1), token_batch(4, 9)
    algorithm = training_loss(model, ahead=True)
    weight = algorithm.weight(batch)
    loss = jax.jit(lambda p, batch: algorithm.loss(p, batch, weight)[0])
    whole, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(sum(loss(params, half) for half in halves), whole, rtol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["mtp_heads"]))
    plain = jax.jit(jax.grad(lambda p: training_loss(model).loss(p, batch, weight["targets"])[0]))(params)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(plain["mtp_heads"]))
