"""Stages on meshes of their own: the numbers of one device, models laid out anew between them, and said so."""

import pytest

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from stages.conftest import rows_of

OWN = {
    "sft": "{fsdp: 8}",
    "reward": "{fsdp: 4, slices: 2}",
    "ppo": "{data: 2, tensor: 4}",  # twice as many devices as heads
}


@pytest.mark.slow
def test_the_numbers_are_those_of_one_device_and_the_manifest_has_the_meshes(config, finished, tmp_path):
    words = [f"stages.{stage}.mesh={mesh}" for stage, mesh in OWN.items()]
    run_recipe(load_config(config, ["mesh={data: 4, fsdp: 2}", *words, "stages.evaluate=null"]), tmp_path / "run")
    [line] = rows_of(tmp_path / "run" / "manifest.jsonl")
    assert line["mesh"]["shape"]["data"] == 4
    shapes = {stage: facts["shape"] for stage, facts in line["meshes"].items()}
    assert [shapes["sft"]["fsdp"], shapes["reward"]["data"], shapes["ppo"]["tensor"]] == [8, 2, 4]
    names = ["loss/train", "grad/norm", "train/rm/loss", "objective/scores", "loss/policy_avg", "loss/value_avg"]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        many, one = (rows_of(place / stage / "metrics.jsonl") for place in (tmp_path / "run", finished))
        for row, expected in zip(many, one, strict=True):
            wanted = {name: expected[name] for name in names if name in expected}
            assert len(wanted) > 1
            assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
