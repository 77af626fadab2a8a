"""The recipe with its tokens split over devices (mesh.sequence): the numbers of one device, with shared prompts."""

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from rlhfjax.stages import reward
from stages.conftest import rows_of

# lengths that four devices divide, and as many heads as they are
SHAPE = ["model.heads=4", "stages.ppo.batch.prompt_length=12", "stages.evaluate=null"]
NAMES = {
    "pretrain": ["loss/train", "loss/validation", "grad/norm"],
    "sft": ["loss/train", "loss/validation", "grad/norm"],
    "reward": ["train/rm/loss", "train/rm/accuracy", "eval/rm/accuracy", "grad/norm"],
    "ppo": ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "loss/ptx", "grad/policy_norm"],
}


def metrics_of(run_dir):
    return {stage: rows_of(run_dir / stage / "metrics.jsonl") for stage in NAMES}


@pytest.fixture(scope="module")
def alone(config, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = command("run", config, "--run-dir", folder, *SHAPE)
    assert code == 0, err
    return metrics_of(folder)


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("mesh", [("data=2", "sequence=4"), ("data=2", "sequence=2", "tensor=2")])
def test_the_numbers_are_those_of_one_device(config, alone, tmp_path, mesh, monkeypatch):
    packed, pack = [], reward.ranking_packer
    monkeypatch.setattr(reward, "ranking_packer", lambda *a, **k: packed.append(pack(*a, **k)) or packed[-1])
    run_recipe(load_config(config, [*SHAPE, *(f"mesh.{axis}" for axis in mesh)]), tmp_path / "run")
    many = metrics_of(tmp_path / "run")
    assert packed
    assert all(packed)  # candidates shared their prompts
    for stage, names in NAMES.items():
        assert len(many[stage]) == len(alone[stage]) > 0
        for row, expected in zip(many[stage], alone[stage], strict=True):
            wanted = {name: expected[name] for name in names if name in expected}
            assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
