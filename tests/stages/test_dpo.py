"""The stage of direct preference optimisation, through the command line, and its rows against a sum by hand."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, ranked_batch, tiny

from rlhfjax.config import schema
from rlhfjax.evaluation.report.run_data import read_run
from rlhfjax.stages.objectives import joined_rows, preference_optimisation
from rlhfjax.training.checkpoint import find_checkpoint, load_model
from stages.conftest import assert_same_bits, saved
from stages.tiny_recipe import recipe


def test_log_probs_are_sums_over_responses_and_the_reference_stands_beside_the_policy():
    # meant to catch prompts in the sum, or padding
    model, batch = tiny(), ranked_batch(3, 4, 6, seed=1)
    params, reference = params_of(model), params_of(model, seed=5)
    algorithm = preference_optimisation(model, schema.PreferenceLoss())
    rows = batch.tokens.reshape(-1, 6), batch.token_mask.reshape(-1, 6)
    both = params | {"reference": reference}
    got = jax.jit(algorithm.log_probs)(both, batch, None), jax.jit(algorithm.reference)(both, batch)
    for mine, weights in zip(got, (params, reference), strict=True):
        log_p = np.asarray(jax.nn.log_softmax(jax.jit(model.logits)(weights, *rows)))
        wanted = np.zeros(12)
        for row in range(12):
            prompt, length = int(batch.prompt_lengths[row // 4]), int(rows[1][row].sum())
            for t in range(prompt, length):
                wanted[row] += log_p[row, t - 1, int(rows[0][row, t])]
        there = np.asarray(batch.mask)
        np.testing.assert_allclose(np.asarray(mine)[there], wanted.reshape(3, 4)[there], rtol=1e-4, atol=1e-5)


def test_rows_hold_nothing_of_absent_candidates():
    batch = ranked_batch(3, 4, 6, seed=1)
    rows = joined_rows(batch)
    assert not np.asarray(batch.mask).all()
    absent = ~np.asarray(batch.mask).reshape(-1)
    assert not np.asarray(rows.segments)[absent].any()
    assert not np.asarray(rows.loss_mask)[absent].any()


@pytest.fixture(scope="module")
def preferring(files, finished, command, tmp_path_factory):
    """A run of dpo, and its evaluation, after the stages that the finished run has too."""
    tree, folder = recipe(files), tmp_path_factory.mktemp("dpo")
    stages, reward = tree["stages"], tree["stages"]["reward"]
    offline = {key: reward[key] for key in ("data", "validation", "batch", "steps", "validate_every")}
    dpo = offline | {"optimizer": {"lr": 3e-3}, "loss": {"beta": 0.5}}
    evaluate = {key: value for key, value in stages["evaluate"].items() if key != "comparisons"}
    tree["stages"] = {"pretrain": stages["pretrain"], "sft": stages["sft"], "dpo": dpo, "evaluate": evaluate}
    for stage in ("tokenizer", "pretrain", "sft"):
        shutil.copytree(finished / stage, folder / "run" / stage)
    (folder / "dpo.yaml").write_text(json.dumps(tree), encoding="utf-8")
    code, _, err = command("run", folder / "dpo.yaml", "--run-dir", folder / "run")
    assert code == 0, err
    return folder / "run"


def test_a_run_starts_at_its_reference_and_learns_what_people_prefer(preferring):
    rows = [json.loads(line) for line in (preferring / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert 0.3 < rows[0]["loss/train"] < np.log(2)  # some pairs are ties, which count among C(K,2)
    assert (rows[0]["rewards/margins"], rows[0]["rewards/accuracies"]) == (pytest.approx(0, abs=1e-5), 0.5)
    assert rows[-1]["rewards/margins"] > 0.01
    assert 0.5 < rows[-1]["eval/dpo/accuracy"] <= 1


def test_what_is_left_is_a_policy_and_the_last_of_the_run(preferring):
    path = find_checkpoint(preferring)
    assert path.parent.parent == preferring / "dpo"
    params = load_model(path)[1]
    assert set(params) == {"embed", "blocks", "final_norm"}  # no reference among them
    before = load_model(find_checkpoint(preferring / "sft"))[1]
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, before)), strict=True)) > 1e-4


def test_what_was_preferred_is_measured_and_compared_with_what_it_began_as(preferring):
    # fails where an evaluation knows ppo alone: no responses of dpo, no loss, none of its seconds
    found = read_run(preferring).evaluation
    assert [policy.name for policy in found.policies] == ["sft", "dpo"]
    assert [abs(policy.kl) < 1e-6 for policy in found.policies] == [True, False]  # that of two equal ones is rounding
    assert [policy.reward for policy in found.policies] == [None, None]  # without a reward model there is no 0 either
    assert list(found.heldout_losses) == ["pretrain", "sft", "dpo"]
    assert list(found.stage_seconds) == ["tokenizer", "pretrain", "sft", "dpo", "evaluate"]
    assert list(found.samples[0].responses) == ["sft", "dpo"]


def test_a_reference_in_the_hosts_memory_changes_no_bit(preferring, command, tmp_path):
    for stage in ("tokenizer", "pretrain", "sft"):
        shutil.copytree(preferring / stage, tmp_path / "run" / stage)
    words = "mesh.offload=all", "stages.evaluate=null", "--run-dir", tmp_path / "run"
    code, _, err = command("run", preferring.parent / "dpo.yaml", *words)
    assert code == 0, err
    assert_same_bits(*(saved(find_checkpoint(place / "dpo")) for place in (tmp_path / "run", preferring)))
