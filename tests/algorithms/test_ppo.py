"""PPO's estimate and loss against loops over responses and tokens, in numpy, float64.

The rollout has responses of one token and of the full length, ends that are missing, scores and values of both signs.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, experience, log_probs_from

from rlhfjax.algorithms.ppo import Ppo

ROWS, LENGTH, BETA = 12, 5, 0.3
MADE = experience(ROWS, 3, LENGTH)
ROLLOUT = MADE.rollout
MASK = np.asarray(ROLLOUT.response_mask)
LENGTHS = MASK.sum(axis=1)


def in_float64(name):
    return np.asarray(getattr(ROLLOUT, name), np.float64)


def ppo(temperature: float = 1.0, **settings) -> Ppo:
    """PPO over a table: logits and values of each position of each row are the parameters themselves."""
    log_probs = log_probs_from(lambda params, rollout: params["policy"], temperature)
    return Ppo(log_probs, lambda params, made: params["value"], **settings)


def estimate(**settings):
    made, metrics = jax.jit(ppo(**settings).estimate)(ROLLOUT, jnp.float32(BETA))
    return made, {name: float(value) for name, value in metrics.items()}


def test_the_rollout_has_the_hard_cases():
    assert {1, LENGTH} <= set(LENGTHS.tolist())
    assert 0 < np.asarray(ROLLOUT.finished).sum() < ROWS
    scores = in_float64("scores")
    assert (scores % 1 != 0).all()
    assert scores.min() < 0 < scores.max()


def final_scores(mode, value):
    scores, finished = in_float64("scores"), np.asarray(ROLLOUT.finished)
    missing = {"replace": np.full(ROWS, value), "subtract": scores - value, "keep": scores}[mode]
    return np.where(finished, scores, missing)


def expected_rewards(mode, value):
    """-β (log π - log π_ref) at each token, and the score at the last one."""
    rewards = np.zeros((ROWS, LENGTH))
    for row, score in enumerate(final_scores(mode, value)):
        for t in range(LENGTHS[row]):
            rewards[row, t] = -BETA * (in_float64("log_probs")[row, t] - in_float64("ref_log_probs")[row, t])
        rewards[row, LENGTHS[row] - 1] += score
    return rewards


def expected_gae(rewards, gamma, lam):
    values, advantages = in_float64("values"), np.zeros((ROWS, LENGTH))
    for row, length in enumerate(LENGTHS):
        running = 0.0
        for t in reversed(range(length)):
            following = values[row, t + 1] if t + 1 < length else 0.0
            running = rewards[row, t] + gamma * following - values[row, t] + gamma * lam * running
            advantages[row, t] = running
    return advantages, np.where(MASK, advantages + values, 0.0)


MODES = [("replace", -1.0), ("replace", -0.25), ("subtract", 0.75), ("keep", 9.0)]


@pytest.mark.parametrize(("mode", "value"), MODES)
def test_rewards_are_the_penalty_and_the_score_at_the_last_real_token(mode, value):
    """With γ = λ = 1 and values 0, differences of neighbouring advantages are the rewards.

    Meant to catch the score at the last column, or one token late; a whole number made of it; replace and subtract
    exchanged; the rule applied to finished responses.
    """
    silent = replace(ROLLOUT, values=jnp.zeros((ROWS, LENGTH)))
    algorithm = ppo(gamma=1.0, lam=1.0, whiten_advantages=False, missing_eos=mode, missing_eos_value=value)
    made, metrics = jax.jit(algorithm.estimate)(silent, jnp.float32(BETA))
    after = np.concatenate([np.asarray(made.advantages)[:, 1:], np.zeros((ROWS, 1))], axis=1)
    wanted = expected_rewards(mode, value)
    assert made.advantages.dtype == jnp.float32
    np.testing.assert_allclose(np.where(MASK, made.advantages - after, 0), wanted, atol=2e-6)
    np.testing.assert_allclose(made.advantages[~MASK], 0)
    np.testing.assert_allclose(metrics["objective/scores"], final_scores(mode, value).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/scores_std"], final_scores(mode, value).std(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], wanted.sum(axis=1).mean(), rtol=1e-5)
    penalties = wanted.sum(axis=1) - final_scores(mode, value)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], penalties.mean(), rtol=1e-4)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0)])
def test_advantages_and_returns_equal_the_loop(gamma, lam):
    # meant to catch a bootstrap value after the end, and γ in the place of λ
    made, metrics = estimate(gamma=gamma, lam=lam, whiten_advantages=False)
    advantages, returns = expected_gae(expected_rewards("replace", -1.0), gamma, lam)
    np.testing.assert_allclose(made.advantages, advantages, atol=2e-6)
    np.testing.assert_allclose(made.returns, returns, atol=2e-6)
    residual = returns - np.where(MASK, in_float64("values"), 0)
    explained = 1 - residual[MASK].var() / returns[MASK].var()
    np.testing.assert_allclose(metrics["val/explained_variance"], explained, rtol=1e-4)


def test_whitening_is_over_all_real_tokens_of_the_batch():
    # meant to catch whitening row by row, with padding in the mean, or before the returns are made
    made, _ = estimate()
    advantages, returns = expected_gae(expected_rewards("replace", -1.0), 1.0, 0.95)
    real = advantages[MASK]
    np.testing.assert_allclose(made.advantages[MASK], (real - real.mean()) / np.sqrt(real.var() + 1e-8), atol=1e-5)
    np.testing.assert_allclose(made.advantages[~MASK], 0)
    np.testing.assert_allclose(made.returns, returns, atol=2e-6)


def test_whitened_rewards_keep_their_mean():
    made, metrics = estimate(whiten_rewards=True, whiten_advantages=False)
    rewards = expected_rewards("replace", -1.0)
    real = rewards[MASK]
    shaped = np.where(MASK, (rewards - real.mean()) / np.sqrt(real.var() + 1e-8) + real.mean(), 0)
    np.testing.assert_allclose(made.advantages, expected_gae(shaped, 1.0, 0.95)[0], atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], rewards.sum(axis=1).mean(), rtol=1e-5)


def test_kl_metrics_equal_the_loops():
    # meant to catch padding positions that count, and per-token means that are means of row means
    _, metrics = estimate()
    sums = {kind: np.zeros(ROWS) for kind in ("k1", "k2", "k3")}
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            x = in_float64("ref_log_probs")[row, t] - in_float64("log_probs")[row, t]
            for kind, value in (("k1", -x), ("k2", x**2 / 2), ("k3", np.exp(x) - 1 - x)):
                sums[kind][row] += value
    for kind, name in (("k1", "kl"), ("k2", "kl_k2"), ("k3", "kl_k3")):
        np.testing.assert_allclose(metrics[f"objective/{name}"], sums[kind].mean(), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"objective/{name}_per_token"], sums[kind].sum() / MASK.sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], -BETA * sums["k1"].mean(), rtol=1e-4)
    assert metrics["objective/kl_coef"] == pytest.approx(BETA)


def test_what_is_said_of_the_responses():
    _, metrics = estimate()
    assert metrics["objective/length"] == pytest.approx(LENGTHS.mean())
    assert metrics["objective/eos_rate"] == pytest.approx(np.asarray(ROLLOUT.finished).mean())
    gap = np.abs(in_float64("sampled_log_probs") - in_float64("log_probs"))[MASK]
    assert metrics["objective/entropy"] == pytest.approx(-in_float64("log_probs")[MASK].sum() / ROWS, rel=1e-5)
    assert metrics["tokens"] == LENGTHS.sum()
    assert metrics["rollout_vs_train/logp_absdiff_max"] == pytest.approx(gap.max(), rel=1e-5)
    assert metrics["rollout_vs_train/logp_absdiff_mean"] == pytest.approx(gap.mean(), rel=1e-5)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    policy = rng.normal(0, 0.5, (ROWS, LENGTH, VOCAB))
    return {
        "policy": jnp.asarray(policy, jnp.float32),
        "value": jnp.asarray(in_float64("values") + rng.normal(0, 0.3, (ROWS, LENGTH)), jnp.float32),
    }


SETTINGS = {"temperature": 0.7, "clip": 0.15, "value_clip": 0.25, "value_coef": 0.4, "entropy_coef": 0.05}


def expected_losses(params, temperature, clip, value_clip, value_coef, entropy_coef):
    """Means over real tokens of the whole batch."""
    policy, value, spread, clipped, held, kl, ratios = ([] for _ in range(7))
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            z = np.asarray(params["policy"], np.float64)[row, t] / temperature
            log_p = z - np.log(np.exp(z).sum())
            spread.append(-(np.exp(log_p) * log_p).sum())
            change = log_p[int(ROLLOUT.response[row, t])] - in_float64("log_probs")[row, t]
            advantage, ratio = float(MADE.advantages[row, t]), np.exp(change)
            near = min(max(ratio, 1 - clip), 1 + clip)
            policy.append(max(-advantage * ratio, -advantage * near))
            clipped.append(-advantage * near > -advantage * ratio)
            kl.append(change**2 / 2)
            ratios.append(ratio)
            v, old = float(params["value"][row, t]), in_float64("values")[row, t]
            target = float(MADE.returns[row, t])
            near = min(max(v, old - value_clip), old + value_clip)
            value.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
            held.append((near - target) ** 2 > (v - target) ** 2)
    policy, value, spread = np.mean(policy), np.mean(value), np.mean(spread)
    return policy + value_coef * value - entropy_coef * spread, {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/entropy_avg": spread,
        "policy/approxkl_avg": np.mean(kl),
        "policy/clipfrac_avg": np.mean(clipped),
        "val/ratio": np.mean(ratios),
        "val/ratio_err": np.mean(np.abs(np.asarray(ratios) - 1)),
        "val/clipfrac_avg": np.mean(held),
    }


def test_loss_and_metrics_equal_the_loop(params):
    # meant to catch a missing temperature or ½, and the wrong sign of the entropy
    algorithm = ppo(**SETTINGS)
    assert int(algorithm.weight(MADE)) == LENGTHS.sum()
    loss, metrics = jax.jit(algorithm.loss)(params, MADE, algorithm.weight(MADE))
    wanted, wanted_metrics = expected_losses(params, **SETTINGS)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert set(metrics) == set(wanted_metrics)
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
        assert metrics[name].dtype == jnp.float32


def test_every_real_token_is_taught_and_no_other(params):
    # meant to catch masks from ids, and an EOS that is left out; entropy and value reach each real token
    algorithm = ppo(**SETTINGS)
    gradient = jax.jit(jax.grad(lambda p: algorithm.loss(p, MADE, algorithm.weight(MADE))[0]))(params)
    taught = np.abs(gradient["policy"]).max(axis=2) > 0
    np.testing.assert_array_equal(taught, MASK)
    assert (np.asarray(gradient["value"])[~MASK] == 0).all()


def test_entropy_bonus_spreads_the_policy(params):
    # meant to catch the other sign
    algorithm = ppo(entropy_coef=1.0)
    still = replace(MADE, advantages=jnp.zeros((ROWS, LENGTH)))

    @jax.jit
    def loss(p):
        return algorithm.loss(p, still, algorithm.weight(still))

    gradient, before = jax.jit(jax.grad(loss, has_aux=True))(params)
    after = loss(jax.tree.map(lambda p, g: p - 100.0 * g, params, gradient))[1]
    assert after["policy/entropy_avg"] > before["policy/entropy_avg"] + 0.01
