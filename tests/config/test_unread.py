"""A setting that nothing reads is an error, with its key and the reason."""

import re

import pytest

from config.test_arithmetic import FULL, problem
from rlhfjax.config import check, load_config, resolved_yaml


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text(FULL, encoding="utf-8")
    return lambda *overrides: load_config(path, overrides)


PRETRAIN = "{data: [{source: a}], steps: 9, batch: {size: 8, length: 8}, optimizer: {lr: 1}}"
SFT = "stages.sft.optimizer"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tokenizer={path: there, vocab_size: 99, kind: unigram}"], "tokenizer: vocab_size, kind .* remove them"),
        (["tokenizer.data=[{source: a.jsonl, weight: 2.0}]"], "tokenizer.data: weight is a share"),
        (["model.architecture.attention.window_pattern=LG"], "attention: window_pattern .* no layer has a window"),
        (["model.architecture.attention.rope_local_theta=5.0"], "rope_local_theta .* no layer has a window"),
        (["model.family=gpt2", "model.architecture.rope_theta=5.0", "model.kv_heads=null"], "rope_theta .* learned"),
        ([f"{SFT}.kind=adafactor", f"{SFT}.b1=0.5", f"{SFT}.eps=1e-3"], "stages.sft.optimizer: b1, eps .* adafactor"),
        ([f"{SFT}.kind=lion_bf16", f"{SFT}.eps=1e-3"], "stages.sft.optimizer: eps .* lion"),
        ([f"{SFT}.schedule=constant", f"{SFT}.final=0.5"], "stages.sft.optimizer: final .* stays at lr"),
        ([f"{SFT}.warmup_from=0.5"], "stages.sft.optimizer: warmup_from .* without warmup_steps"),
        (["stages.pretrain.batch.pack=false"], "stages.pretrain.batch: pack would not be read"),
        (["stages.pretrain.batch.overlong=drop"], "stages.pretrain.batch: overlong would not be read"),
        (["stages.sft.validation=[{source: b.jsonl, weight: 0.5}]"], "stages.sft.validation: weight is a share"),
        (["stages.evaluate.losses=[{source: a.jsonl, weight: 0.5}]"], "stages.evaluate.losses: weight is a share"),
        (["stages.reward.normalize={on: none, scale: true}"], "stages.reward.normalize: scale .* on is none"),
        (["stages.evaluate.batch.epochs=2"], "stages.evaluate.batch: epochs .* updates nothing"),
        (["stages.evaluate.sampling.old_log_probs=rollout"], "old_log_probs .* no old policy"),
        (["model.lora={}", "stages={pretrain: " + PRETRAIN + "}"],
         "model.lora: no stage of this recipe trains adapters"),
        (["profile.start=30", "stages.sft.epochs=null", "stages.sft.steps=29"], "profile.start 30: .* than 29 steps"),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_refused(load, overrides, said):
    # fails without the row's check: each was taken without a word
    found = problem(load(*overrides))
    assert re.search(said, found, re.DOTALL), found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.architecture.attention={window: 4, window_pattern: LG, rope_local_theta: 5.0}"],
        ["model.family=gemma3", "model.architecture.attention.window_pattern=LG"],
        [f"{SFT}.kind=muon", f"{SFT}.b1=0.5", f"{SFT}.eps=1e-3"],  # AdamW moves the rest
        [f"{SFT}.warmup_steps=2", f"{SFT}.warmup_from=0.5", f"{SFT}.schedule=linear", f"{SFT}.final=0.0"],
        ["stages.sft.batch.pack=false", "stages.sft.batch.overlong=drop"],
        ["stages.pretrain.data=[{source: a, weight: 2.0}, {source: b, weight: 1.0}]"],
        ["profile.start=3"],
        ["stages.ppo.kl={controller: fixed, horizon: 50.0}"],  # may wait for its switch
    ],
)
def test_what_is_read_is_taken(load, tmp_path, overrides):
    run = load(*overrides)
    check(run, 1)
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(run), encoding="utf-8")
    check(load_config(path), 1)  # every key is named there
