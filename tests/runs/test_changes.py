"""What may change in the configuration of a run that is there, and what --only and --from do."""

import pytest
from stages.tiny_recipe import STAGES

from rlhfjax.config import load_config
from rlhfjax.errors import ConfigError
from rlhfjax.runs import recipe, run_recipe


@pytest.fixture
def done(monkeypatch):
    """Stages that are marked as done without doing anything; holds what was done, in order."""
    names = []

    def run_stages(run, run_dir, stages, *_):
        for stage in stages:
            names.append(stage)
            (run_dir / stage).mkdir(parents=True)
            recipe.write_json(run_dir / stage / recipe.COMPLETE, {"stage": stage, "seconds": 0.0, "run": len(names)})

    monkeypatch.setattr(recipe, "_run_stages", run_stages)
    monkeypatch.setattr(recipe, "_print_results", lambda *_: None)
    return names


@pytest.fixture
def run(config, tmp_path, done):
    """Runs the recipe with overrides; the stages that were done."""

    def ran(*overrides, **options):
        del done[:]
        run_recipe(load_config(config, overrides), tmp_path / "run", **options)
        return tuple(done)

    return ran


def test_stages_run_in_order_and_once(run):
    assert run() == STAGES
    assert run() == ()


def test_only_runs_one_stage_whose_turn_it_is(run, tmp_path):
    assert run(only="tokenizer") == ("tokenizer",)
    with pytest.raises(ConfigError, match=r"stage sft needs pretrain, which is not done in .*run; run it first"):
        run(only="sft")
    assert run(only="pretrain") == ("pretrain",)
    assert run(only="pretrain") == ()
    assert run() == STAGES[2:]


def test_from_does_a_stage_and_all_after_it_again(run, tmp_path):
    run()
    for stage in STAGES:
        (tmp_path / "run" / stage / "old").touch()
    assert run(start_from="reward") == ("reward", "ppo", "evaluate")
    assert [stage for stage in STAGES if (tmp_path / "run" / stage / "old").exists()] == list(STAGES[:3])


def test_a_stage_that_the_recipe_lacks(run):
    with pytest.raises(
        ConfigError, match=r"expected one of tokenizer, pretrain, sft \(the stages of this recipe\), got 'ppo'"
    ):
        run("stages.reward=null", "stages.ppo=null", "stages.evaluate=null", only="ppo")


def test_a_change_of_what_is_done_is_refused_by_name(run, tmp_path):
    run()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        run("stages.sft.steps=9", "model.width=32", "seed=4")
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{tmp_path / 'run'} was made with another configuration: model.width 16 -> 32; seed 3 -> 4; "
        "stages.sft.steps 4 -> 9. Use another --run-dir, or --from STAGE to do again what the change touches"
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_from_allows_changes_of_the_stages_it_does_again(run, tmp_path):
    run()
    with pytest.raises(ConfigError, match=r"stages\.sft\.steps 4 -> 9"):
        run("stages.sft.steps=9", "stages.ppo.clip=0.1", start_from="reward")
    assert (tmp_path / "run" / "reward" / "complete.json").exists()  # refused before anything is deleted
    assert run("stages.ppo.clip=0.1", start_from="reward") == ("reward", "ppo", "evaluate")
    assert load_config(tmp_path / "run" / "config.yaml").stages.ppo.loss.clip == 0.1
    assert run("stages.ppo.clip=0.1") == ()
    assert run("model.width=32", "seed=4", "stages.ppo=null", start_from="tokenizer") == (*STAGES[:4], "evaluate")


def test_stages_that_have_not_begun_may_change(run):
    run(only="tokenizer")
    run(only="pretrain")
    assert run("stages.sft.steps=9", "stages.reward.loss.kind=hinge", only="sft") == ("sft",)
    with pytest.raises(ConfigError, match=r"stages\.sft\.steps 9 -> 4"):
        run()
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size 320 -> 330"):
        run("stages.sft.steps=9", "tokenizer.vocab_size=330")


def test_what_touches_no_result_may_change(run):
    run()
    assert run("description=another", "logging.samples=2", "checkpoints.keep=5", "mesh.fsdp=2") == ()


def test_a_run_that_never_began_takes_any_configuration(run, monkeypatch):
    def fail(*_):
        raise ConfigError("nothing was done")

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_run_stages", fail)
        with pytest.raises(ConfigError, match="nothing was done"):
            run()
    assert run("seed=9", "model.width=32") == STAGES


def test_a_stage_added_later_is_run(run):
    without = ("stages.ppo=null", "stages.evaluate=null")
    assert run(*without) == STAGES[:4]
    assert run() == ("ppo", "evaluate")
