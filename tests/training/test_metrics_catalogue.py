"""The catalogue holds the names that dashboards of this field know, each complete."""

import dataclasses

from rlhfjax.training.metrics_catalogue import METRICS, metric_of

KNOWN = [
    "objective/kl",
    "objective/scores",
    "objective/rlhf_reward",
    "objective/non_score_reward",
    "objective/entropy",
    "objective/kl_coef",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "loss/ptx",
    "val/ratio",
    "val/clipfrac_avg",
    "objective/eos_rate",
    "objective/length",
    "train/rm/accuracy",
    "perf/decode_tokens_per_s",
    "perf/train_tokens_per_s",
    "timing/rollout_s",
    "timing/score_s",
    "timing/estimate_s",
    "timing/update_s",
    "lr",
    "episode",
]


def test_known_names_are_there():
    assert set(KNOWN) <= set(METRICS)


def test_every_entry_is_complete_and_under_its_name():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert all(dataclasses.astuple(metric)), name
        assert " " not in name


def test_names_with_a_data_set():
    assert metric_of("loss/validation/chat").name == "loss/validation/NAME"
    assert metric_of("loss/train").name == "loss/train"
    assert metric_of("loss/nothing") is None
    assert metric_of("nothing") is None
