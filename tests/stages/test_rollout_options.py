"""Int8 sampling, guesses, heads and a shared trunk through a whole recipe: what is trained, measured and left out."""

import json

import jax
import numpy as np
import pytest

import rlhfjax
from rlhfjax.config import load_config
from rlhfjax.config.arithmetic import check
from rlhfjax.errors import ConfigError
from rlhfjax.training.checkpoint import find_checkpoint, load_model
from stages.conftest import rows_of
from stages.tiny_recipe import recipe


@pytest.fixture(scope="module")
def run(files, command, tmp_path_factory):
    """The directory of a finished run of a policy with two heads, which guess in PPO; evaluation looks guesses up."""
    folder = tmp_path_factory.mktemp("options")
    settings = recipe(files)
    settings["model"]["architecture"] = {"embedding": {"mtp_heads": 2}}
    stages = settings["stages"]
    stages["ppo"]["sampling"] |= {"precision": "int8", "speculate": "heads", "speculate_tokens": 2}
    stages["ppo"]["value"] = {"trunk": "policy"}
    stages["evaluate"]["sampling"] |= {"speculate": "ngram", "speculate_tokens": 3}
    (folder / "options.yaml").write_text(json.dumps(settings), encoding="utf-8")
    code, _, err = command("run", folder / "options.yaml", "--run-dir", folder / "run")
    assert code == 0, err
    return folder / "run"


def heads_of(path):
    return jax.tree.map(np.asarray, load_model(find_checkpoint(path), item="policy")[1]["mtp_heads"])


@pytest.mark.slow
def test_heads_learn_in_pretraining_and_sft_and_are_carried_by_ppo(run):
    for stage in ("pretrain", "sft"):
        rows = rows_of(run / stage / "metrics.jsonl")
        for n in (1, 2):
            assert all(row[f"mtp/loss/{n}"] > 0 and 0 <= row[f"mtp/hit_rate/{n}"] <= 1 for row in rows)
    pretrained, tuned, after = (heads_of(run / stage) for stage in ("pretrain", "sft", "ppo"))
    for name in ("up", "down"):
        assert np.abs(tuned[name] - pretrained[name]).max() > 0
        np.testing.assert_array_equal(after[name], tuned[name])


@pytest.mark.slow
def test_what_sampling_added_is_measured(run):
    for row in rows_of(run / "ppo" / "metrics.jsonl"):
        assert 1e-6 < row["rollout_vs_train/logp_absdiff_mean"] <= row["rollout_vs_train/logp_absdiff_max"] < 0.5
        assert 0 <= row["speculation/kept"] <= 1
        assert 1 <= row["speculation/tokens_per_call"] <= 3
        assert row["policy/first_minibatch_ratio_err"] < 1e-5  # old log-probabilities are those of training


@pytest.mark.slow
def test_a_value_head_on_the_trunk_is_saved_as_a_model_of_its_own(run):
    model, value = load_model(find_checkpoint(run / "ppo"), item="value")
    _, policy = load_model(find_checkpoint(run / "ppo"), item="policy")
    assert np.abs(value["head"]["kernel"]).max() > 0  # it was 0 at first
    for mine, theirs in zip(
        jax.tree.leaves(value["decoder"]["blocks"]), jax.tree.leaves(policy["blocks"]), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert model.config.vocab_size == rlhfjax.load(run).config.vocab_size


@pytest.mark.slow
def test_scalar_models_have_no_heads_and_the_policy_answers_faster(run):
    assert "mtp_heads" not in rlhfjax.load(run / "reward").params["decoder"]
    policy = rlhfjax.load(run)
    prompts = ["the film was", "a story"]
    plain = policy.generate(prompts, max_new_tokens=8, seed=5, n=2)
    for guesses in (2, 4):  # by heads, by lookup
        answers = policy.generate(prompts, max_new_tokens=8, seed=5, n=2, speculate=guesses)
        for row, same in zip(answers, plain, strict=True):
            assert [each.tokens for each in row] == [each.tokens for each in same]
            assert all(each.calls is not None and each.calls <= len(each.tokens) - 1 for each in row)
    assert plain[0][0].calls is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.ppo.sampling.speculate=heads"], "speculate_tokens 4 is more than model.*mtp_heads 0"),
        (["model.architecture.embedding.mtp_heads=1", "model.family=mixtral"], "not beside experts"),
        (["model.family=transformer_2017", "stages.evaluate.sampling.precision=int8"], "are for decoders"),
    ],
)
def test_what_a_model_cannot_do_is_said_before_it_is_made(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config(config, changes), 1)
