"""FLOPs worked out by hand, pairs counted one by one, and the machine's own peak."""

import jax
import numpy as np
import pytest
from tiny import experience, one_prompt_each, ranked_batch, tiny, token_batch

from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.lora import init_lora, join
from rlhfjax.training import flops
from rlhfjax.training.flops import ForwardFlops, OfflineFlops, OnlineFlops, forward_flops, machine_peak, seen_by


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def test_a_decoder_with_grouped_heads_by_hand():
    # a layer: queries 16x16, keys and values 16x8 each, out 16x16, three matrices 16x48; two layers
    got = forward_flops(tiny().config, shapes(tiny()))
    assert got == ForwardFlops(2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 48), 16 * 16, 2 * 16)
    # 3 tokens see 1 + 2 + 3, logits at 2 of them
    assert got(3, 6, 2) == 2 * 3 * got.weights + 2 * 2 * 256 + 4 * 32 * 6


def test_gpt2_small_is_about_six_flops_a_parameter_and_token_in_training():
    # 124 M parameters without positions; 768 wide: 12 x 12 x 768^2 + 50257 x 768 (Radford et al. 2019, the smallest)
    model = LanguageModel(decoder_config("gpt2", vocab_size=50257, layers=12, width=768, heads=12, context=1024))
    forward = forward_flops(model.config, shapes(model))
    assert forward.weights + forward.vocabulary == 12 * 12 * 768**2 + 50257 * 768
    step = OfflineFlops(forward)({"tokens": 1000.0, "work/pairs": 0.0})
    assert step == 6 * 1000 * (12 * 12 * 768**2 + 50257 * 768)
    assert OfflineFlops(forward, frozen=True)({"tokens": 1000.0, "work/pairs": 0.0}) == step * 2 / 3


def test_experts_count_as_often_as_a_token_meets_them_and_untied_words_once():
    model = LanguageModel(
        decoder_config("mixtral", vocab_size=32, layers=1, width=16, heads=4, context=8, mlp_width=24)
    )
    forward = forward_flops(model.config, shapes(model))
    attention, router = 4 * 16 * 16, 16 * 8
    assert forward.weights == attention + router + 2 * 3 * 16 * 24  # 2 of 8 experts
    assert forward.vocabulary == 32 * 16


def test_adapters_are_work_too():
    params = shapes(tiny())
    adapters = jax.eval_shape(lambda key: init_lora(key, params, 3, ["attention/query"]), jax.random.key(0))
    more = forward_flops(tiny().config, join(params, adapters)).weights - forward_flops(tiny().config, params).weights
    assert more == 2 * (16 * 3 + 3 * 16)


def brute(rows):
    """Pairs of a list of sequence lengths, one by one."""
    return sum(1 for length in rows for i in range(length) for j in range(length) if j <= i)


def test_tokens_see_their_own_document_up_to_themselves():
    batch = token_batch(6, 9)
    segments = np.asarray(batch.segments)
    lengths = [int((row == number).sum()) for row in segments for number in (1, 2)]
    assert float(seen_by(batch)["work/pairs"]) == brute(lengths)


def test_the_prompt_of_a_comparison_is_read_once():
    # fails when it counts for every candidate, there or not
    ranked = one_prompt_each(ranked_batch(3, 4, 7))
    seen = set()
    for b, k in zip(*np.nonzero(np.asarray(ranked.mask)), strict=True):
        for t in range(int(ranked.token_mask[b, k].sum())):
            shared = t < int(ranked.prompt_lengths[b])
            seen |= {(b, 0 if shared else k, t, other) for other in range(t + 1)}
    counts = seen_by(ranked)
    assert float(counts["work/pairs"]) == len(seen)
    assert float(counts["work/tokens"]) == len({place[:3] for place in seen}) < int(ranked.real_tokens())
    counts = {"tokens": 1e9} | {name: float(x) for name, x in counts.items()}
    forward = ForwardFlops(10.0, 3.0, 1.0)
    wanted = 3 * (20 * counts["work/tokens"] + 4 * counts["work/pairs"])
    assert OfflineFlops(forward, predicts=False)(counts) == wanted
    assert OfflineFlops(forward)(counts) == wanted + 3 * 6 * counts["work/tokens"]


def test_a_rollout_sees_prompt_and_response_as_one_sequence():
    rollout = experience(6, 5, 8).rollout  # prompts are padded on the left, responses on the right
    prompts, responses = (np.asarray(m.sum(1)) for m in (rollout.prompt_mask, rollout.response_mask))
    got = seen_by(rollout)
    assert float(got["work/pairs"]) == brute((prompts + responses).tolist())
    assert float(got["work/prompt"]) == prompts.sum()


def test_an_iteration_samples_once_scores_by_four_passes_and_trains_two_models_an_epoch():
    policy, value, reward = ForwardFlops(10.0, 3.0, 0.0), ForwardFlops(100.0, 0.0, 0.0), ForwardFlops(1000.0, 0.0, 0.0)
    counts = {"tokens": 4.0, "work/prompt": 6.0, "work/pairs": 0.0, "policy/epochs_run": 2.0}
    one = 2 * (10 * 10 + 4 * 3)  # the policy reads ten tokens and predicts four
    wanted = one + 2 * one + 2 * 1000 + 2 * 10_000 + 2 * 3 * (one + 2 * 1000)
    assert OnlineFlops(policy, value, (reward,))(counts) == wanted
    mixed = OnlineFlops(policy, value, (reward,), pretraining_tokens=5.0)(counts)
    assert mixed - wanted == 2 * 3 * 2 * (5 * 10 + 5 * 3)
    assert wanted - OnlineFlops(policy, value, (reward,), policy_passes=1)(counts) == one


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
    ],
)
def test_known_accelerators_have_their_published_peak(kind, peak, monkeypatch):
    device = type("Device", (), {"device_kind": kind, "platform": "gpu"})()
    monkeypatch.setattr(flops.jax, "devices", lambda: [device])
    monkeypatch.setattr(flops.jax, "device_count", lambda: 4)
    assert machine_peak.__wrapped__() == 4 * peak


def test_eight_devices_of_one_cpu_are_one_machine(monkeypatch):
    monkeypatch.setattr(flops, "_measured", lambda device: 5e9)
    assert machine_peak.__wrapped__() == 5e9  # fails when it is multiplied by eight


def test_the_measured_peak_is_that_of_some_machine():
    assert 1e8 < flops._measured(jax.devices()[0]) < 1e16
