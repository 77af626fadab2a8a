"""A rehearsed configuration is tiny, and has stages, algorithms and meshes of the one that it stands for."""

import math

import pytest

from rlhfjax import config as configuration
from rlhfjax.config.meshes import mesh_shape
from rlhfjax.config.recipe import stages_of
from rlhfjax.errors import ConfigError
from rlhfjax.rehearsal.shrinking import LENGTH, STEPS, Made, devices_per_node, tiny

KINDS = ("document", "demonstration", "comparison", "prompt")
MADE = Made("llama", {kind: f"./data/{kind}.jsonl" for kind in KINDS}, "/prepared", real=False)


@pytest.mark.parametrize("name", configuration.shipped())
@pytest.mark.parametrize("nodes", [2, 16])
def test_every_shipped_configuration_is_made_tiny_on_its_mesh(name, nodes):
    run = configuration.load_config(name)
    each = devices_per_node(run, nodes, None)
    made = tiny(run, nodes, each, MADE)  # which checks it for so many devices
    assert math.prod(mesh_shape(made.mesh, nodes * each).values()) == nodes * each
    assert made.mesh.axes == run.mesh.axes
    added = {"sft"} if run.model.checkpoint and not run.stages.sft else set()
    assert set(stages_of(made)) == {*stages_of(run), *added, "tokenizer"}
    assert made.model.width <= 512
    for stage, section in made.stages:
        if section and stage not in ("evaluate", *added):
            assert section.steps == STEPS
            assert section.optimizer.kind == getattr(run.stages, stage).optimizer.kind
            assert getattr(section.batch, "length", 0) <= LENGTH
    assert configuration.load_config(name) == run


def test_grouping_experts_and_micro_batches_stay():
    run = configuration.load_config("qwen3_30b_a3b_ppo", ["stages.sft.batch.micro=64"])
    made = tiny(run, 16, 4, MADE)
    assert made.model.architecture.experts.count % made.mesh.expert == 0
    assert made.stages.sft.batch.size == 2 * made.stages.sft.batch.micro
    assert made.stages.ppo.batch.size == 2 * made.stages.ppo.batch.minibatch
    assert made.stages.ppo.rewards[0].model == "reward"


def test_rewards_that_read_what_is_not_here_are_a_length():
    run = configuration.load_config("llama3_8b_grpo")
    made = tiny(run, 16, 4, MADE)
    assert [(term.kind, term.title) for term in made.stages.grpo.rewards] == [("length", "numeric_match")]
    assert made.stages.grpo.groups.size == 2


@pytest.mark.parametrize(
    ("mesh", "nodes", "each"),
    [("{data: -1}", 4, 1), ("{data: -1, fsdp: 16, tensor: 4}", 16, 4), ("{data: -1, tensor: 4}", 6, 2),
     ("{data: 2, fsdp: 4}", 4, 2)],
)  # fmt: skip
def test_the_fewest_devices_that_the_mesh_fits(mesh, nodes, each):
    assert devices_per_node(configuration.load_config("quickstart", [f"mesh={mesh}"]), nodes, None) == each


def test_nodes_that_do_not_divide_a_mesh_are_refused():
    run = configuration.load_config("quickstart", ["mesh={data: 2, fsdp: 4}"])
    with pytest.raises(ConfigError, match="--nodes 3: expected a number that divides the 8 devices"):
        devices_per_node(run, 3, None)
    with pytest.raises(ConfigError, match=r"mesh: .* = 8, expected the number of devices, 4"):
        tiny(run, 2, 2, MADE)
