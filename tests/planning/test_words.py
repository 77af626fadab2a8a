"""What `rlhfjax plan` refuses before anything is compiled, and what it takes for granted."""

import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.config import load_config
from rlhfjax.errors import ConfigError
from rlhfjax.planning.answer import asked
from rlhfjax.planning.assumed import Assumed
from rlhfjax.planning.changes import changed_by
from rlhfjax.planning.plan import steps_of, tokens_of
from rlhfjax.planning.shapes import PUBLISHED, described
from rlhfjax.planning.topology import parsed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v5p"], "expected KIND:SIZES such as v5p:8x8x8"),
        (["--topology", "v9:4x4"], "expected a kind among v4, v5e, v5p"),
        (["--topology", "v5p:4x4"], "v5p has three sizes, such as v5p:8x8x8; got 'v5p:4x4'"),
        (["--topology", "v5e:4x4x4"], "v5e has two sizes"),
        (["--topology", "h100:8x8", "--num-slices", "2"], "of TPUs; got 2 of h100"),
        (["--topology", "v5p:4x4x4", "--devices", "8"], "give one of them"),
        (["--assume", "rows.pto=3"], "KEY among rows.tokenizer"),
        (["--assume", "disk=fast"], "with N above 0"),
        (["--assume", "minutes=-1"], "with N above 0"),
        (["--json", "/proc/none/plan.json"], "--json /proc/none: expected a directory"),
        (["--programs", "/dev/null/programs"], "--programs /dev/null/programs: expected a directory"),
        (["mesh.tensor=3", "--devices", "8"], "mesh: fsdp 1 x sequence 1 x tensor 3 x expert 1 = 3"),
        (["stages.ppo.sampling.max_new_tokens=9999"], "is more than model.context"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(words, said, monkeypatch):
    monkeypatch.setattr("rlhfjax.planning.plan.compiled", lambda *_: pytest.fail("it compiles"))
    result = CliRunner().invoke(app, ["plan", "quickstart", *words])
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_checkpoint_that_is_elsewhere_has_the_published_shape_of_its_name(tmp_path):
    said = []
    run, vocabulary = described(load_config("llama3_8b_ppo"), said.append)
    assert (run.model.layers, run.model.width, run.model.kv_heads, vocabulary) == (32, 4096, 8, {"size": 128256})
    assert run.model.remat == "full"
    assert "planned with the published shape of llama3_8b" in said[0]
    with pytest.raises(ConfigError, match=r"needs its shape.*one of llama3_8b, llama3_70b"):
        described(load_config("llama3_8b_ppo", [f"model.checkpoint={tmp_path}/mine"]), said.append)


def test_published_shapes_have_the_published_numbers_of_parameters():
    from rlhfjax.config.schema import Model
    from rlhfjax.config.shape import model_shape, parameter_count

    counts = {
        name: parameter_count(model_shape(Model.model_validate(shape)), words) / 1e9
        for name, (shape, words) in PUBLISHED.items()
    }
    assert counts == pytest.approx(
        {"llama3_8b": 8.03, "llama3_70b": 70.55, "qwen3_8b": 8.19, "qwen3_30b_a3b": 30.53}, rel=2e-3
    )


def test_slices_of_the_machine_are_those_of_the_mesh():
    how = {"programs": None, "assumed": Assumed(), "say": lambda _: None}
    question = asked(load_config("llama3_8b_ppo"), "v5p:4x4x4", None, 2, **how)
    assert (question.run.mesh.slices, question.machine.devices) == (2, 128)
    assert question.recipe.mesh.slices == 1


def test_steps_are_those_of_the_configuration_or_of_rows_that_are_given():
    run = load_config("instructgpt_1b3")
    assert steps_of(run, "ppo", {}) == run.stages.ppo.steps
    assert steps_of(run, "sft", {}) is None
    assert steps_of(run, "sft", {"sft": 13_000}) == -(-2 * 13_000 // 32)  # 2 epochs, 32 in a batch
    assert tokens_of(run, "ppo/rollout") == 512 * 1024
    assert tokens_of(run, "reward/step") == 64 * 9 * 2048


def test_overrides_of_a_remedy_are_those_of_a_command_line():
    run = load_config("quickstart")
    changed = changed_by(run, ("stages.ppo.batch.micro=8", "mesh.offload=all"))
    assert (changed.stages.ppo.batch.micro, changed.mesh.offload) == (8, "all")
    with pytest.raises(ConfigError, match=r"stages.ppo.batch.micro=7.*must divide"):
        changed_by(run, ("stages.ppo.batch.micro=7",))


def test_every_kind_of_chip_is_whole():
    for kind, sizes in (("v4", "2x2x2"), ("v6e", "4x4"), ("a100", "2x8"), ("h200", "2x8")):
        machine = parsed(f"{kind}:{sizes}", 1)
        assert machine.chip.memory > 2**33
        assert machine.chip.bandwidth < machine.chip.flops / 50
