"""The table of stages against the schema, and one test per fact that others take from it, over every stage."""

import json

import pytest

from rlhfjax.config import load_config
from rlhfjax.config.recipe import (
    FACTS,
    NAMES,
    STAGES,
    compared,
    entries_of,
    needs_of,
    parents_of,
    section_of,
    stages_of,
)
from rlhfjax.config.schema import Data, Offline, Online, Stages, Tokenizer
from rlhfjax.record_kinds import FIELDS

from .test_arithmetic import FULL
from .test_loading import models_in

TRAINED = [facts.name for facts in STAGES if facts.role]
DPO = "stages.dpo={data: [{source: c.jsonl}], steps: 5, batch: {size: 8, length: 16}, optimizer: {lr: 1}}"
GRPO = (
    "stages.grpo={data: [{source: d.jsonl}], steps: 5, batch: {size: 8, prompt_length: 8}, optimizer: {lr: 1}, "
    "sampling: {max_new_tokens: 8}}"
)


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text(FULL, encoding="utf-8")
    return lambda *overrides: load_config(path, overrides)


def data_keys(model, prefix=""):
    """The dotted keys of a section, and of those in it, that hold data entries."""
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from [f"{prefix}{name}"] if inner is Data else data_keys(inner, f"{prefix}{name}.")


def test_every_stage_of_the_schema_has_a_row_in_its_order():
    assert list(NAMES) == ["tokenizer", *Stages.model_fields]


def test_a_key_belongs_to_one_stage_and_stays():
    # what 0.1 drew depends on these numbers: a stage that is added gets the next one
    keys = {facts.name: facts.key for facts in STAGES}
    first = {"tokenizer": 0, "pretrain": 1, "sft": 2, "reward": 3, "ppo": 4, "evaluate": 5, "dpo": 6}
    assert {name: keys[name] for name in first} == first
    assert sorted(keys.values()) == list(range(len(STAGES)))


@pytest.mark.parametrize("stage", NAMES)
def test_all_data_of_a_section_have_their_kind(stage):
    # fails where a list of data is not in the table: it would have no fingerprint in the manifest
    model = Tokenizer if stage == "tokenizer" else models_in(Stages.model_fields[stage].annotation)[0]
    reads = FACTS[stage].reads
    assert sorted(read.key for read in reads) == sorted(data_keys(model))
    assert {read.kind for read in reads} <= {*FIELDS, "rated_text"}


def test_entries_come_with_their_kinds(load):
    run = load("stages.sft.validation=[{source: v.jsonl}]")
    found = {stage: [(entry.source, kind) for entry, kind in entries_of(run, stage)] for stage in stages_of(run)}
    assert found == {
        "tokenizer": [("a.jsonl", "document")],
        "pretrain": [("a.jsonl", "document")],
        "sft": [("b.jsonl", "demonstration"), ("v.jsonl", "demonstration")],
        "reward": [("c.jsonl", "comparison"), ("b.jsonl", "demonstration")],
        "ppo": [("d.jsonl", "prompt"), ("a.jsonl", "document")],
        "evaluate": [("d.jsonl", "prompt")],
    }
    ratings = {name: {"source": f"{name}.jsonl"} for name in ("judge", "baseline", "test")}
    run = load(f"stages.evaluate.ratings={json.dumps(ratings)}", "stages.evaluate.exact_match.data=[{source: e}]")
    assert [(entry.source, kind) for entry, kind in entries_of(run, "evaluate")[1:]] == [
        *((f"{name}.jsonl", "rated_text") for name in ratings),
        ("e", "demonstration"),
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([DPO], {"sft": ["pretrain"], "reward": ["sft"], "dpo": ["sft"], "ppo": ["sft", "reward"],
                 "evaluate": ["pretrain", "sft", "reward", "dpo", "ppo"]}),
        (["stages.sft=null", "stages.reward.start_from=pretrain"],
         {"reward": ["pretrain"], "ppo": ["pretrain", "reward"],
          "evaluate": ["pretrain", "reward", "ppo"]}),
        (["stages.reward.start_from=pretrain", "stages.pretrain=null"],
         {"ppo": ["sft", "reward"], "evaluate": ["sft", "reward", "ppo"]}),
    ],
)  # fmt: skip
def test_stages_whose_models_a_stage_reads(load, overrides, expected):
    run = load(*overrides)
    assert {stage: found for stage in NAMES if (found := parents_of(run, stage))} == expected


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], ["reward"]),
        (["stages.ppo.rewards=[{length: {target: 4}}]"], ["reward"]),  # which the value model starts from
        (["stages.ppo.rewards=[{length: {target: 4}}]", "stages.ppo.value.start_from=policy"], []),
        (["stages.ppo.rewards=[{length: {target: 4}}]", "stages.ppo.value.trunk=policy"], []),
        (["stages.ppo.rewards=[{model: there}]", "stages.ppo.value.start_from=policy"], []),
        (["stages.ppo.rewards=[{length: {target: 4}}, {model: reward}]", "stages.ppo.value.start_from=policy"],
         ["reward"]),
    ],
)  # fmt: skip
def test_a_reward_model_is_needed_where_rewards_or_the_value_model_name_it(load, overrides, needed):
    run = load(*overrides)
    assert needs_of(run, "ppo") == needed
    assert parents_of(run, "ppo") == ["sft", *needed]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["sft", "ppo"]),
        ([DPO], ["sft", "ppo"]),
        ([DPO, "stages.ppo=null"], ["sft", "dpo"]),
        ([DPO, GRPO], ["sft", "grpo"]),
        (["stages.ppo=null"], ["sft"]),
        (["stages.ppo=null", "stages.sft=null"], []),
        (["stages.sft=null"], ["pretrain", "ppo"]),
        (["stages.sft=null", "stages.pretrain=null"], ["ppo"]),
    ],
)
def test_the_last_policy_is_compared_with_the_one_that_it_started_from(load, overrides, expected):
    assert compared(load(*overrides)) == expected


def test_stages_of_a_recipe_are_those_that_it_has(load):
    run = load("stages.ppo=null", "stages.pretrain=null")
    assert stages_of(run) == ["tokenizer", "sft", "reward", "evaluate"]
    assert section_of(run, "tokenizer") is run.tokenizer
    assert section_of(run, "ppo") is None


@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_that_trains_has_a_unit_and_a_base(stage):
    section = models_in(Stages.model_fields[stage].annotation)[0]
    assert FACTS[stage].unit
    assert issubclass(section, Online if FACTS[stage].online else Offline)
