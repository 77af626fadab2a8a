"""DPO against the paper's formula by hand, loops over pairs, and an optimum that can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms.dpo import Dpo
from rlhfjax.types import RankedBatch


def ranked(ranks, mask=None) -> RankedBatch:
    """Candidates of one token, which is their number in the batch."""
    ranks = jnp.asarray(ranks, jnp.int32)
    there = jnp.ones(ranks.shape, bool) if mask is None else jnp.asarray(mask, bool)
    tokens = jnp.arange(ranks.size, dtype=jnp.int32).reshape(*ranks.shape, 1)
    return RankedBatch(tokens, there[:, :, None], ranks, there, jnp.zeros(len(ranks), jnp.int32))


def dpo(reference, **settings) -> Dpo:
    """The parameters are the log-probabilities by candidate; the reference's are given."""
    reference = jnp.asarray(reference, jnp.float32).reshape(-1)
    return Dpo(
        lambda params, batch, key: params[batch.tokens[:, :, 0]],
        lambda params, batch: reference[batch.tokens[:, :, 0]],
        **settings,
    )


def measured(algorithm, log_probs, batch):
    params = jnp.asarray(log_probs, jnp.float32).reshape(-1)
    compute = jax.jit(jax.value_and_grad(lambda p: algorithm.loss(p, batch, algorithm.weight(batch)), has_aux=True))
    (loss, metrics), gradient = compute(params)
    return float(loss), {name: float(x) for name, x in metrics.items()}, np.asarray(gradient)


def test_two_candidates_by_hand():
    # h = (-10 + 11) - (-12 + 11.5) = 1.5; -log σ(0.5 x 1.5) = 0.38687; its slope is -0.5 σ(-0.75) = -0.16041
    batch = ranked([[2, 1]])
    loss, metrics, gradient = measured(dpo([[-11.5, -11.0]], beta=0.5), [[-12.0, -10.0]], batch)
    assert loss == pytest.approx(0.38687, abs=1e-5)
    np.testing.assert_allclose(gradient, [0.16041, -0.16041], atol=1e-5)
    wanted = {
        "loss/train": 0.38687,
        "rewards/chosen": 0.5,
        "rewards/rejected": -0.25,
        "rewards/margins": 0.75,
        "rewards/accuracies": 1.0,
        "logps/chosen": -10.0,
        "logps/rejected": -12.0,
    }
    assert metrics == pytest.approx(wanted, abs=1e-5)


def test_at_the_reference_the_loss_is_log_2_and_likes_the_chosen():
    rng = np.random.default_rng(0)
    log_probs = rng.normal(-20, 5, (6, 2))
    ranks = np.where(rng.random((6, 1)) < 0.5, [[1, 2]], [[2, 1]])
    loss, metrics, gradient = measured(dpo(log_probs, beta=0.3), log_probs, ranked(ranks))
    assert loss == pytest.approx(np.log(2), abs=1e-6)
    assert (metrics["rewards/accuracies"], metrics["rewards/margins"]) == (0.5, 0.0)
    np.testing.assert_allclose(gradient.reshape(6, 2), np.where(ranks == 1, -0.15, 0.15) / 6, rtol=1e-5)


def test_a_reference_that_reads_the_parameters_has_no_gradient():
    read = lambda params, batch, key=None: params[batch.tokens[:, :, 0]]  # noqa: E731
    loss, _, gradient = measured(Dpo(read, read, beta=0.3), [-3.0, -2.0], ranked([[1, 2]]))
    assert loss == pytest.approx(np.log(2), abs=1e-6)
    np.testing.assert_allclose(gradient, [-0.15, 0.15], rtol=1e-5)


HARD = [[1, 2, 3, 4], [1, 1, 2, 9], [3, 1, 2, 9], [1, 9, 9, 9]]
THERE = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


# fails with a tie that counts, and absent candidates in C(K,2): seen
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.1)])
def test_more_candidates_equal_the_loop_over_pairs(kind, smoothing):
    rng, beta = np.random.default_rng(1), 0.4
    log_probs, reference = rng.normal(-9, 2, (4, 4)), rng.normal(-9, 2, (4, 4))
    there = np.asarray(THERE, bool)
    total, right, pairs = 0.0, 0.0, 0
    for row in range(3):  # the last prompt has one candidate, and compares nothing
        count = there[row].sum()
        for w, l in np.argwhere(there[row][:, None] & there[row][None, :]):  # noqa: E741
            if HARD[row][w] >= HARD[row][l]:
                continue
            h = log_probs[row, w] - reference[row, w] - log_probs[row, l] + reference[row, l]
            each = {
                "sigmoid": lambda h: np.log1p(np.exp(-beta * h)),
                "hinge": lambda h: max(0.0, 1 - beta * h),
                "ipo": lambda h: (h - 1 / (2 * beta)) ** 2,
            }[kind]
            total += ((1 - smoothing) * each(h) + smoothing * each(-h)) / (count * (count - 1) / 2)
            right, pairs = right + (h > 0), pairs + 1
    junk = np.where(there, log_probs, np.nan)
    algorithm = dpo(np.where(there, reference, np.inf), beta=beta, kind=kind, label_smoothing=smoothing)
    loss, metrics, gradient = measured(algorithm, junk, ranked(HARD, THERE))
    assert loss == pytest.approx(total / 3, rel=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx(right / pairs)
    assert np.isfinite(gradient).all()
    assert (gradient.reshape(4, 4)[~there] == 0).all()


def test_parts_of_a_batch_add_up():
    rng = np.random.default_rng(2)
    log_probs, batch, algorithm = rng.normal(-9, 2, 16), ranked(HARD, THERE), dpo(rng.normal(-9, 2, 16))
    whole, metrics, gradient = measured(algorithm, log_probs, batch)
    params, weight = jnp.asarray(log_probs, jnp.float32), algorithm.weight(batch)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
    slopes = jax.jit(jax.value_and_grad(algorithm.loss, has_aux=True))
    each = [slopes(params, part, weight) for part in parts]
    np.testing.assert_allclose(sum(loss for (loss, _), _ in each), whole, rtol=1e-6)
    np.testing.assert_allclose(sum(slope for _, slope in each), gradient, rtol=1e-5, atol=1e-8)
    for name, value in metrics.items():
        np.testing.assert_allclose(sum(some[name] for (_, some), _ in each), value, rtol=1e-5, atol=1e-6)


def test_preferences_of_a_bradley_terry_judge_lead_to_the_reference_times_exp_reward_over_beta():
    # A judge prefers i to j with w_i / (w_i + w_j), reward log w_i: the optimum is π_ref · w^(1/β) / Z (Rafailov et al.
    # 2023, eq. 4 and 6). meant to catch half or twice β, and a reference that is left out
    weights, beta = [1, 2, 3, 5], 0.5
    reference = np.log([0.4, 0.3, 0.2, 0.1])
    rows = [(i, j) for i in range(4) for j in range(4) if i != j for _ in range(weights[i])]  # i was preferred
    pairs = jnp.asarray(rows, jnp.int32)
    batch = ranked([[1, 2]] * len(rows))
    algorithm = Dpo(
        lambda params, batch, key: jax.nn.log_softmax(params)[pairs],
        lambda params, batch: jnp.asarray(reference, jnp.float32)[pairs],
        beta=beta,
    )
    optimizer = optax.sgd(8.0)

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state = carry
            slope = jax.grad(lambda p: algorithm.loss(p, batch, algorithm.weight(batch))[0])(params)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=400)[0][0]

    policy = np.asarray(jax.nn.softmax(trained(jnp.zeros(4))))
    optimum = np.exp(reference) * np.asarray(weights) ** (1 / beta)
    optimum /= optimum.sum()
    assert np.abs(np.exp(reference) - optimum).sum() / 2 > 0.3
    np.testing.assert_allclose(policy, optimum, atol=1e-4)
