"""The rules of correct RLHF, on the compiled steps of the PPO stage with real decoders.

Two runs of three iterations on prompts of different lengths: GPT-2 at temperature 1 on one device, and a Llama with
grouped heads at temperature 0.7 on eight, with minibatches, micro batches, two epochs and the pretraining mix. The
equations by themselves are tested with the algorithms, what a sample depends on with the sampler.
"""

from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    STYLES,
    first_part,
    left_mask,
    lenient,
    params_of,
    ppo_config,
    random_tokens,
    right_mask,
    scalar_params_of,
    tiny,
    token_batch,
)

from rlhfjax.algorithms import Mix
from rlhfjax.functional import token_log_probs
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.sharding import make_mesh, place_batch, state_shardings
from rlhfjax.stages.online_programs import OnlineLearner, build, optimizer_of, passes_of
from rlhfjax.stages.ppo import ppo_objective
from rlhfjax.stages.rewards import Judges
from rlhfjax.training.loop import Beside
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.metrics_catalogue import metric_of
from rlhfjax.training.online import OnlineSteps, train_online
from rlhfjax.training.state import init_state
from rlhfjax.types import Experience, OnlineState, PromptBatch, Rollout

PAD, STOP, PROMPT, RESPONSE, ITERATIONS = 0, 1, 5, 6, 3
KL = {"coef": 0.05, "controller": "adaptive", "target": 0.5, "horizon": 100.0}
ADAM = {"lr": 0.02, "schedule": "constant"}
LOGITS = jax.jit(lambda policy, *arguments: policy.response_logits(*arguments), static_argnums=0)


@dataclass(frozen=True)
class Recorded:
    """A run of three iterations: what went in, what every step returned, and the compiled steps themselves."""

    config: Any
    policy: Any
    reward: Any
    frozen: dict[str, Any]
    algorithm: Any
    steps: OnlineSteps
    state: OnlineState
    params: list[Any]  # before each iteration
    rollouts: list[Rollout]
    experiences: list[Experience]
    metrics: list[dict[str, float]]

    @property
    def temperature(self) -> float:
        return self.config.sampling.temperature


def prompts(rows: int, iteration: int) -> PromptBatch:
    lengths = np.random.default_rng(iteration).integers(1, PROMPT + 1, rows)
    uid = jnp.arange(rows, dtype=jnp.int32) + 100 * iteration
    return PromptBatch(random_tokens(rows, PROMPT, seed=iteration, low=2), left_mask(lengths, PROMPT), uid)


def record(directory, config, style, mesh) -> Recorded:
    policy, reward = tiny(style), tiny("gpt2")
    frozen = {"reference": params_of(policy, std=0.15), "rewards": {"model": scalar_params_of(reward, seed=2)}}
    algorithm = ppo_objective(config, policy, reward)
    optimizer = lenient(optimizer_of(config))
    params = {"policy": frozen["reference"], "value": frozen["rewards"]["model"]}
    train = init_state(mesh, params, optimizer)
    state = OnlineState(train, jnp.float32(config.kl.coef), jnp.int32(0))
    state = jax.device_put(state, state_shardings(mesh, state))
    frozen = jax.device_put(frozen, state_shardings(mesh, frozen))
    sampling = SamplingParams(RESPONSE, STOP, PAD, config.sampling.temperature)
    judges = Judges(tuple(config.rewards), {"model": reward})
    learner = OnlineLearner(algorithm, {"policy": policy, "value": reward}, params, judges, frozen, optimizer)
    steps = build(config, mesh, learner, state, sampling)
    params, rollouts, experiences, metrics = [], [], [], []

    def score(current, *rest):
        params.append(jax.device_get(current))
        rollouts.append(steps.score(current, *rest))
        return rollouts[-1]

    def estimate(*args):
        made = steps.estimate(*args)
        experiences.append(made[0])
        return made

    class Writer(MetricsWriter):
        def write(self, step, values, taken=None):
            metrics.append(super().write(step, values))
            return metrics[-1]

    writer = Writer(directory, 0, tensorboard=False)
    rows = config.batch.size
    pretraining = repeat(place_batch(mesh, token_batch(2 * rows, 8))) if config.ptx else repeat(None)
    state = train_online(
        replace(steps, score=score, estimate=estimate),
        state,
        frozen,
        (place_batch(mesh, prompts(rows, i)) for i in range(ITERATIONS)),
        pretraining,
        iterations=ITERATIONS,
        key=jax.random.key(0),
        beside=Beside("ppo", writer, lambda step: config.optimizer.lr),
        sampled=lambda iteration, rollout: None,
        keep=lambda state, iteration, stop: None,
    )
    writer.close()
    return Recorded(config, policy, reward, frozen, algorithm, steps, state, params, rollouts, experiences, metrics)


@pytest.fixture(scope="module", params=["gpt2, T 1, one device", "llama, T 0.7, eight devices"])
def run(request, tmp_path_factory) -> Recorded:
    directory = tmp_path_factory.mktemp("ppo")
    if request.param.startswith("gpt2"):
        sections = {"batch": {"size": 8, "epochs": 1, "prompt_length": PROMPT}, "kl": KL, "optimizer": ADAM}
        return record(directory, ppo_config(**sections), "gpt2", make_mesh(devices=jax.devices()[:1]))
    config = ppo_config(
        batch={"size": 16, "minibatch": 8, "micro": 4, "epochs": 2, "prompt_length": PROMPT},
        sampling={"max_new_tokens": RESPONSE, "temperature": 0.7},
        kl=KL,
        optimizer=ADAM,
        ptx={"coef": 0.5, "data": [{"source": "unused"}], "length": 8},
    )
    return record(directory, config, "llama-gqa", make_mesh(2, 2, 1, 2))


def flat(rollout: Rollout) -> tuple:
    return rollout.prompt, rollout.prompt_mask, rollout.response, rollout.response_mask


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def expected_log_probs(run: Recorded, params, rollout: Rollout):
    """log softmax(z / T) at each response token, in numpy."""
    z = np.asarray(LOGITS(run.policy, params, *map(np.asarray, flat(rollout))), np.float64)
    log_p = log_softmax(z / run.temperature)
    return np.take_along_axis(log_p, np.asarray(rollout.response)[..., None], axis=2)[..., 0]


def test_1_nothing_has_moved_at_the_first_minibatch(run):
    """Ratio 1, approximate KL 0, nothing clipped; the policy is the reference at step 0.

    Meant to catch new log-probabilities without the temperature, or logits that are read one position late.
    """
    for metrics in run.metrics:
        assert metrics["policy/first_minibatch_ratio_err"] < 2e-6
    assert run.metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert run.metrics[0]["objective/kl_k2"] == pytest.approx(0, abs=1e-10)
    assert run.metrics[0]["objective/kl_k3"] == pytest.approx(0, abs=1e-6)
    ppo = run.algorithm.first if isinstance(run.algorithm, Mix) else run.algorithm
    minibatch = first_part(jax.tree.map(lambda x: np.asarray(x)[1::2], run.experiences[0]))
    _, metrics = jax.jit(ppo.loss)(run.params[0], minibatch, ppo.weight(minibatch))
    assert metrics["val/ratio"] == pytest.approx(1, abs=2e-6)
    assert metrics["policy/approxkl_avg"] < 1e-11
    assert metrics["policy/clipfrac_avg"] == 0
    # and everything moves afterwards
    assert run.metrics[1]["objective/kl_k3"] > 1e-3
    assert run.metrics[2]["rollout_vs_train/logp_absdiff_max"] > 0


def test_2_rollout_and_training_agree_in_the_run(run):
    for metrics in run.metrics:
        assert metrics["rollout_vs_train/logp_absdiff_max"] < 1e-5


@pytest.mark.parametrize(("style", "temperature"), [*((style, 0.7) for style in STYLES), ("gpt2", 1.0)])
def test_2_cached_decoding_and_the_training_forward_agree(style, temperature):
    # fails when decode counts positions from the padded length, or sees padding of the prompt: seen
    model, sampling = tiny(style), SamplingParams(RESPONSE, STOP, PAD, temperature)
    params, batch = params_of(model, std=0.15), prompts(24, iteration=7)
    drawn = jax.jit(lambda p, b, k: generate(model, p, b, k, sampling))(params, batch, jax.random.key(1))
    assert len(set(drawn.response_mask.sum(axis=1).tolist())) > 1
    assert len(set(batch.mask.sum(axis=1).tolist())) > 2
    forward = jax.jit(lambda p, r: token_log_probs(model.response_logits(p, *flat(r)), r.response, temperature))
    gap = jnp.abs(drawn.sampled_log_probs - forward(params, drawn))[drawn.response_mask]
    assert gap.max() < 1e-5
    assert drawn.sampled_log_probs[drawn.response_mask].std() > 0.1


def test_3_temperature_is_in_old_and_reference_log_probs(run):
    # for T 1 only the positions are tested
    for params, rollout in zip(run.params, run.rollouts, strict=True):
        mask = np.asarray(rollout.response_mask)
        old = expected_log_probs(run, params["policy"], rollout)
        reference = expected_log_probs(run, run.frozen["reference"], rollout)
        np.testing.assert_allclose(np.asarray(rollout.log_probs)[mask], old[mask], atol=1e-5)
        np.testing.assert_allclose(np.asarray(rollout.ref_log_probs)[mask], reference[mask], atol=1e-5)
    assert np.abs(old - reference)[mask].max() > 0.05


def test_3_temperature_is_in_new_log_probs(run):
    # old log-probabilities of the first rollout, a policy that has moved since
    ppo = run.algorithm.first if isinstance(run.algorithm, Mix) else run.algorithm
    made = jax.device_get(run.experiences[0])
    packed = first_part(made)
    _, metrics = jax.jit(ppo.loss)(run.params[2], packed, ppo.weight(packed))
    change = expected_log_probs(run, run.params[2]["policy"], made.rollout) - made.rollout.log_probs
    mask = made.rollout.response_mask
    np.testing.assert_allclose(metrics["val/ratio"], np.exp(change[mask]).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], np.square(change[mask]).mean() / 2, rtol=1e-3)


def test_4_masks_come_from_lengths(run):
    # meant to catch a mask from `ids != pad`, and one that leaves the end out
    padding_drawn, ends = 0, 0
    for rollout, metrics in zip(run.rollouts, run.metrics, strict=True):
        lengths = []
        for tokens in np.asarray(rollout.response).tolist():
            lengths.append(tokens.index(STOP) + 1 if STOP in tokens else RESPONSE)
            padding_drawn += tokens[: lengths[-1]].count(PAD)
            ends += STOP in tokens
        np.testing.assert_array_equal(rollout.response_mask, right_mask(lengths, RESPONSE))
        assert metrics["objective/length"] == pytest.approx(np.mean(lengths))
    assert padding_drawn > 0
    assert 0 < ends < 3 * run.config.batch.size


def test_5_everything_the_update_reads_is_float32(run):
    for made in run.experiences:
        rollout = made.rollout
        numbers = (made.advantages, made.returns, rollout.log_probs, rollout.ref_log_probs, rollout.values)
        assert {x.dtype for x in (*numbers, rollout.scores)} == {jnp.dtype("float32")}
    scores = np.concatenate([np.asarray(made.rollout.scores) for made in run.experiences])
    assert (scores % 1 != 0).all()
    assert scores.min() < 0 < scores.max()


def test_6_the_score_is_that_of_the_response_by_itself(run):
    """Read at the last real token; neither padding nor the neighbours in the batch matter.

    Here each row goes alone, without its padding on the left. Meant to catch a score read at the last column.
    """
    one = jax.jit(lambda p, t, m: jax.lax.map(lambda r: run.reward.scores(p, r[0][None], r[1][None])[0], (t, m)))
    for rollout in run.rollouts:
        tokens = np.full((len(rollout.prompt), PROMPT + RESPONSE), 7, np.int32)
        mask = np.zeros(tokens.shape, bool)
        prompt, prompt_mask, response, response_mask = map(np.asarray, flat(rollout))
        for row in range(len(tokens)):
            ids = [*prompt[row][prompt_mask[row]], *response[row][response_mask[row]]]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        alone = one(jax.device_get(run.frozen["rewards"]["model"]), tokens, mask)
        np.testing.assert_allclose(rollout.scores, alone, atol=2e-5)


def test_6_the_value_model_starts_as_the_reward_model(run):
    # V before the last token of a response is the reward model's score of what came before it
    rollout = run.rollouts[0]
    shorter = np.asarray(rollout.response_mask)
    last = shorter.sum(axis=1) - 1
    rows = np.flatnonzero(last > 0)
    shorter = shorter & (np.arange(RESPONSE) < last[:, None])
    parts = (*map(np.asarray, flat(rollout)[:3]), shorter)
    scores = jax.jit(run.reward.response_scores)(jax.device_get(run.frozen["rewards"]["model"]), *parts)
    values = np.take_along_axis(np.asarray(rollout.values), last[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(values[rows], np.asarray(scores)[rows], atol=2e-5)


def test_7_the_controller_follows_the_kl_of_whole_responses(run):
    # meant to catch the KL of a token, a horizon in iterations, and a coefficient that is moved twice
    coef, rows = KL["coef"], run.config.batch.size
    for metrics, rollout in zip(run.metrics, run.rollouts, strict=True):
        assert metrics["objective/kl_coef"] == pytest.approx(coef, rel=1e-5)
        per_token = np.asarray(rollout.log_probs - rollout.ref_log_probs) * np.asarray(rollout.response_mask)
        assert metrics["objective/kl"] == pytest.approx(per_token.sum(axis=1).mean(), abs=1e-5)
        coef *= 1 + np.clip(metrics["objective/kl"] / KL["target"] - 1, -0.2, 0.2) * rows / KL["horizon"]
    assert float(run.state.kl_coef) == pytest.approx(coef, rel=1e-5)
    assert coef != pytest.approx(KL["coef"], rel=0.01)


def test_8_advantages_are_whitened_over_all_devices(run):
    # meant to catch each device whitening its own rows
    estimate = jax.jit((run.algorithm.first if isinstance(run.algorithm, Mix) else run.algorithm).estimate)
    for made, metrics in zip(run.experiences, run.metrics, strict=True):
        real = np.asarray(made.advantages, np.float64)[np.asarray(made.rollout.response_mask)]
        assert real.mean() == pytest.approx(0, abs=1e-5)
        assert real.std() == pytest.approx(1, abs=1e-3)
        again, _ = estimate(jax.device_get(made.rollout), jnp.float32(metrics["objective/kl_coef"]))
        np.testing.assert_allclose(made.advantages, again.advantages, atol=1e-4)


def test_each_step_is_compiled_once(run):
    # meant to catch a state that leaves the update in another layout than it came in
    steps = run.steps
    compiled = [getattr(step, "func", step) for step in (steps.rollout, steps.score, steps.estimate, steps.update)]
    # 0 where programs of other tests have driven it out of the cache that all share
    assert all(step._cache_size() <= 1 for step in compiled)


def test_the_state_keeps_its_layout_and_counts(run):
    mesh = run.state.train.step.sharding.mesh
    wanted = state_shardings(mesh, run.state)
    for leaf, sharding in zip(jax.tree.leaves(run.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    updates = ITERATIONS * passes_of(run.config).steps
    assert (int(run.state.iteration), int(run.state.train.step)) == (ITERATIONS, updates)
    assert all(metrics["policy/epochs_run"] == run.config.batch.epochs for metrics in run.metrics)
    assert [metrics["episode"] for metrics in run.metrics] == [run.config.batch.size * i for i in (1, 2, 3)]


def test_every_metric_is_in_the_catalogue(run):
    assert [name for name in run.metrics[0] if metric_of(name) is None] == []
