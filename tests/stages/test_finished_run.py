"""What a finished run leaves behind, and what its numbers must be."""

import json
import math
import re
import subprocess
import sys
from itertools import pairwise

import jax
import numpy as np
import pytest

import rlhfjax
from rlhfjax.config import config_hash, load_config
from rlhfjax.data.batches import right_padded
from rlhfjax.data.pipeline import Reader
from rlhfjax.evaluation.report.run_data import read_run
from rlhfjax.evaluation.results import Evaluation
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.metrics_catalogue import METRICS, metric_of
from stages.conftest import rows_of, saved
from stages.tiny_recipe import STAGES, STEPS

TRAINED = ("pretrain", "sft", "reward", "ppo")


@pytest.fixture(scope="module")
def metrics(finished):
    return {stage: rows_of(finished / stage / "metrics.jsonl") for stage in TRAINED}


# The directory -------------------------------------------------------------------------------------------------------


def test_the_directory_is_complete(finished):
    files = {"config.yaml", "manifest.jsonl", "report.html", "inputs", "time.jsonl"}
    assert {path.name for path in finished.iterdir()} == {*files, *STAGES}
    for stage in STAGES:
        done = json.loads((finished / stage / "complete.json").read_text(encoding="utf-8"))
        assert done["stage"] == stage
        assert done["seconds"] >= 0
    for stage in TRAINED:
        steps = {path.name for path in (finished / stage / "checkpoints").iterdir()}
        assert steps == {str(STEPS - 1), str(STEPS)}  # the newest two, and no half-written one
        assert {"metrics.jsonl", "samples.jsonl", "ledger.jsonl"} <= {
            path.name for path in (finished / stage).iterdir()
        }
        assert list((finished / stage / "tensorboard").glob("events.*"))
    assert (finished / "tokenizer" / "tokenizer.model").exists()
    assert (finished / "evaluate" / "evaluation.json").exists()


def test_only_the_owner_reads_it(finished):
    def mode(path):
        return oct(path.stat().st_mode & 0o777)

    folders = [finished, *(finished / stage for stage in STAGES)]
    assert {mode(path) for path in folders} == {"0o700"}
    named = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    assert {path.name: mode(path) for path in named if mode(path) != "0o600"} == {}


def test_its_configuration_loads_as_the_one_it_ran(finished, config):
    assert load_config(finished / "config.yaml") == load_config(config)


def test_the_manifest_tells_what_ran(finished, config):
    [line] = rows_of(finished / "manifest.jsonl")
    run = load_config(config)
    assert (line["attempt"], line["status"], line["exit_code"], line["seed"]) == (1, "finished", 0, 3)
    assert line["config_hash"] == config_hash(run)
    assert line["config"]["stages"]["ppo"]["ptx"]["coef"] == 0.5
    assert {"jax", "flax", "numpy", "rlhfjax"} <= line["packages"].keys()
    assert all(re.match(r"\d+\.\d+", number) for number in line["packages"].values())
    assert line["devices"] == ["cpu"]
    assert line["started"] <= line["ended"]
    assert str(config) in line["argv"]


def test_a_second_run_does_nothing_and_imports_no_jax(finished, config, environment):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "config.yaml"}
    program = (
        "import sys; from rlhfjax.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    )
    words = [sys.executable, "-c", program, "run", str(config), "--run-dir", str(finished)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "config.yaml"}
    assert {path: time for path, time in after.items() if path != finished} == {
        path: time for path, time in before.items() if path != finished
    }


# The numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAINED)
def test_every_step_has_finite_metrics_that_the_catalogue_knows(metrics, stage):
    assert [row["step"] for row in metrics[stage]] == list(range(1, STEPS + 1))
    for row in metrics[stage]:
        assert {name for name in row if metric_of(name) is None} == set()
        assert {name: value for name, value in row.items() if not math.isfinite(value)} == {}


def test_ppo_logs_every_name_it_promises(metrics):
    promised = {
        "objective/kl", "objective/scores", "objective/rlhf_reward", "objective/non_score_reward",
        "objective/entropy", "objective/kl_coef", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg",
        "loss/value_avg", "loss/ptx", "val/ratio", "val/clipfrac_avg", "objective/eos_rate", "objective/length",
        "perf/decode_tokens_per_s", "perf/train_tokens_per_s", "timing/rollout_s", "timing/score_s",
        "timing/estimate_s", "timing/update_s", "lr", "episode",
    }  # fmt: skip
    assert promised <= METRICS.keys()
    for row in metrics["ppo"]:
        assert promised - row.keys() == set()
    assert [row["episode"] for row in metrics["ppo"]] == [16, 32, 48, 64]
    assert all("train/rm/accuracy" in row for row in metrics["reward"])


def test_held_out_data_are_measured_when_they_should_be(metrics):
    for stage, name in (
        ("pretrain", "loss/validation/documents.jsonl"),
        ("sft", "loss/validation/demonstrations.jsonl"),
        ("reward", "eval/rm/accuracy/comparisons.jsonl"),
    ):
        assert [row["step"] for row in metrics[stage] if name in row] == [2, 4]
        assert all(row[name] == row[name.rpartition("/")[0]] for row in metrics[stage] if name in row)


def test_the_first_iteration_starts_at_the_reference(metrics):
    first, *later = metrics["ppo"]
    assert abs(first["objective/kl"]) < 1e-4
    assert first["objective/kl_k3"] < 1e-4
    assert first["objective/kl_coef"] == pytest.approx(0.02)
    assert any(abs(row["objective/kl"]) > 1e-3 for row in later)
    for row in metrics["ppo"]:
        assert row["policy/first_minibatch_ratio_err"] < 1e-5
        assert row["rollout_vs_train/logp_absdiff_max"] < 1e-4


def test_the_kl_coefficient_follows_the_controller(metrics):
    # Ziegler et al. 2019: coef x (1 + clip(kl / target - 1, -0.2, 0.2) x episodes / horizon), here 16 of 100.
    rows = metrics["ppo"]
    for row, following in pairwise(rows):
        error = min(max(row["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        expected = row["objective/kl_coef"] * (1 + error * 16 / 100)
        assert following["objective/kl_coef"] == pytest.approx(expected, rel=1e-5)


def test_the_reward_model_is_centred_on_the_demonstrations(finished, files, config):
    facts = json.loads((finished / "reward" / "complete.json").read_text(encoding="utf-8"))
    assert abs(facts["eval/rm/normalized_mean"]) < 1e-5
    assert facts["eval/rm/normalized_std"] > 0
    # The same on the very responses that it was centred on, read from the file again.
    model, run = rlhfjax.load(finished / "reward"), load_config(config)
    normalize, reader = run.stages.reward.normalize, Reader(model.tokenizer, files / "prepared", run.seed)
    pairs = reader.demonstration_ids(normalize.data, run.stages.reward.batch.length, normalize.count)
    tokens, mask = right_padded([prompt + response for prompt, response in pairs], model.tokenizer.pad_id)
    scores = jax.jit(model.network.scores)(model.params, tokens, mask)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(scores.std()) == pytest.approx(facts["eval/rm/normalized_std"], rel=1e-4)
    assert facts["normalized_on"] == f"{len(pairs)} demonstrations"
    lengths = sorted(len(response) for _, response in pairs)
    expected = {"shortest": lengths[0], "mean": pytest.approx(np.mean(lengths), abs=0.005), "longest": lengths[-1]}
    assert facts["normalized_lengths"] == expected


def test_samples_are_text_with_their_score_and_kl(finished, files):
    rows = rows_of(finished / "ppo" / "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(1, STEPS + 1) for _ in range(4)]
    asked = {record["prompt"] for record in rows_of(files / "prompts.jsonl")}
    for row in rows:
        assert {"prompt", "response", "score", "kl", "length", "finished"} <= row.keys()
        assert row["prompt"] in asked
        assert 1 <= row["length"] <= 8
        assert math.isfinite(row["score"])
        assert row["finished"] or row["length"] == 8


def test_the_evaluation_holds_every_part(finished):
    path = finished / "evaluate" / "evaluation.json"
    made = Evaluation.from_json(path.read_text(encoding="utf-8"))
    assert made.heldout_losses.keys() == {"pretrain", "sft", "ppo"}
    assert [row.name for row in made.policies] == ["sft", "ppo"]
    assert all(row.responses == 20 for row in made.policies)
    assert made.policies[0].kl == pytest.approx(0.0, abs=1e-4)
    assert len(made.samples) == 20
    assert made.reward_accuracy[0].name == "reward model"
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert "tiny" in report
    assert [attempt["status"] for attempt in read_run(finished).attempts] == ["finished"]


def test_the_evaluated_loss_is_that_of_the_training(finished, metrics):
    made = Evaluation.from_json((finished / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    last = metrics["pretrain"][-1]["loss/validation/documents.jsonl"]
    assert made.heldout_losses["pretrain"]["documents.jsonl"] == pytest.approx(last, abs=1e-5)


def test_held_out_figures_are_of_the_model_that_is_handed_on(finished, files, metrics):
    """Both stages keep a moving average: document by document from its logits, and pair by pair by the evaluation."""
    model = rlhfjax.load(finished / "pretrain")
    t, windows = model.tokenizer, []
    for record in rows_of(files / "documents.jsonl"):
        row = [t.bos_id, *t.encode(record["text"]), t.eos_id]
        windows += [row[i : i + 32] for i in range(0, len(row) - 1, 31)]
    tokens, mask = right_padded(windows, t.pad_id)
    log_probs = jax.nn.log_softmax(model.logits(tokens, mask))[:, :-1]
    targets = np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=2)[:, :, 0]
    assert metrics["pretrain"][-1]["loss/validation"] == pytest.approx(-targets[mask[:, 1:]].mean(), abs=1e-5)
    made = Evaluation.from_json((finished / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    share = made.reward_accuracy[0].values["comparisons"].estimate
    assert metrics["reward"][-1]["eval/rm/accuracy"] == pytest.approx(share, abs=1e-6)


# The models ----------------------------------------------------------------------------------------------------------


def test_the_run_loads_as_its_last_policy(finished):
    model = rlhfjax.load(finished)
    assert model.role == "policy"
    assert model.tokenizer.fingerprint == Tokenizer.load(finished / "tokenizer").fingerprint
    [[completion]] = model.generate(["the film"], max_new_tokens=4)
    assert completion.text == model.tokenizer.decode(completion.tokens)
    assert len(completion.tokens) == len(completion.log_probs) <= 4
    assert rlhfjax.load(finished / "reward").role == "reward"


def test_stages_start_from_each_other(finished):
    def embedding(stage, item):
        done = json.loads((finished / stage / "complete.json").read_text(encoding="utf-8"))
        tree = saved(finished / stage / "checkpoints" / str(done["step"]))
        decoder = "['decoder']" if item in ("reward", "value") else ""
        return tree[f"{item}{decoder}['embed']['embedding']"]

    for one, other, updates in (
        (("sft", "policy"), ("pretrain", "average"), STEPS),
        (("reward", "reward"), ("sft", "policy"), STEPS),
        (("ppo", "policy"), ("sft", "policy"), STEPS * 4),
        (("ppo", "value"), ("reward", "reward"), STEPS * 4),
    ):
        # Adam moves a parameter by about the learning rate an update; two fresh models are 0.1 apart.
        assert 0 < abs(embedding(*one) - embedding(*other)).max() < updates * 3e-3


def test_the_chosen_step_has_the_lowest_validation_loss(finished, metrics):
    losses = {row["step"]: row["loss/validation"] for row in metrics["sft"] if "loss/validation" in row}
    done = json.loads((finished / "sft" / "complete.json").read_text(encoding="utf-8"))
    assert done["step"] == min(losses, key=losses.__getitem__)
