"""Mesh, batches, lengths, shapes and stages that do not go together."""

import pytest

from rlhfjax.config import (
    check,
    check_updates,
    describe,
    least_devices,
    load_config,
    mesh_shape,
    resolved_yaml,
)
from rlhfjax.config.schema import Mesh
from rlhfjax.errors import ConfigError

FULL = """\
name: full
model: {layers: 2, width: 16, heads: 4, kv_heads: 2, mlp_width: 32, context: 32}
tokenizer: {vocab_size: 64, data: [{source: a.jsonl}]}
stages:
  pretrain: {data: [{source: a.jsonl}], steps: 20, batch: {size: 16, micro: 8, length: 32}, optimizer: {lr: 1}}
  sft: {data: [{source: b.jsonl}], epochs: 2, batch: {size: 8, length: 16}, optimizer: {lr: 1}}
  reward:
    data: [{source: c.jsonl}]
    steps: 5
    batch: {size: 8, length: 16, candidates: 4}
    optimizer: {lr: 1}
    normalize: {data: [{source: b.jsonl}]}
  ppo:
    data: [{source: d.jsonl}]
    steps: 10
    batch: {size: 32, minibatch: 16, micro: 8, epochs: 2, prompt_length: 8}
    sampling: {max_new_tokens: 8}
    optimizer: {lr: 1}
    ptx: {coef: 1, ratio: 2, length: 32, data: [{source: a.jsonl}]}
  evaluate: {data: [{source: d.jsonl}], batch: {size: 16, prompt_length: 8}, sampling: {max_new_tokens: 8}}
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text(FULL, encoding="utf-8")
    return lambda *overrides: load_config(path, overrides)


def test_a_resolved_configuration_is_one_that_runs(load, tmp_path):
    # fails when a key that stands at its default counts as one that somebody chose: seen (experts of a dense model)
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(load()), encoding="utf-8")
    check(load_config(path), 1)


def problem(run, devices=1):
    with pytest.raises(ConfigError) as caught:
        check(run, devices)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({}, 6, (6, 1, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (2, 2, 1, 2, 1)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}, 8, (2, 2, 2, 1, 1)),
        ({"expert": 4}, 8, (2, 1, 1, 1, 4)),
    ],
)
def test_mesh_takes_all_devices(mesh, devices, sizes):
    assert tuple(mesh_shape(Mesh(**mesh), devices).values()) == sizes


def test_mesh_that_does_not_fit_shows_its_product():
    with pytest.raises(ConfigError, match=r"fsdp 3 x .* x expert 1 = 3 must divide the number of devices, 8"):
        mesh_shape(Mesh(fsdp=3), 8)
    with pytest.raises(ConfigError, match="data 2 x fsdp 2 x sequence 1 x tensor 1 x expert 1 = 4, expected"):
        mesh_shape(Mesh(data=2, fsdp=2), 8)
    with pytest.raises(ConfigError, match="must divide the number of devices, 1;"):
        mesh_shape(Mesh(fsdp=2), 1)


def test_least_devices():
    assert least_devices(Mesh()) == 1
    assert least_devices(Mesh(fsdp=4, tensor=2)) == 8
    assert least_devices(Mesh(data=2, fsdp=4)) == 8


def test_what_fits_passes(load):
    check(load(), 1)
    check(load(), 8)
    check(load("mesh={data: 2, fsdp: 2, tensor: 2}"), 8)
    check(load("mesh={data: 2, sequence: 8}"), 16)


@pytest.mark.parametrize(
    ("overrides", "devices", "expected"),
    [
        (["stages.sft.batch.size=12"], 8,
         "stages.sft.batch.size 12 must be a multiple of mesh.data x mesh.fsdp = 8 x 1 = 8; make it 8 or 16"),
        (["stages.sft.batch.size=4"], 8, "stages.sft.batch.size 4 must be a multiple of mesh.data x mesh.fsdp = "
         "8 x 1 = 8; make it 8, or"),
        (["stages.pretrain.batch.micro=4", "mesh.fsdp=4"], 8,
         "stages.pretrain.batch.micro 4 must be a multiple of mesh.data x mesh.fsdp = 2 x 4 = 8"),
        (["stages.reward.batch.size=6"], 4, "stages.reward.batch.size 6 must be a multiple"),
        (["stages.reward.batch.micro=2"], 4, "stages.reward.batch.micro 2 must be a multiple"),
        (["stages.ppo.batch.micro=4", "stages.ppo.ptx=null"], 8, "stages.ppo.batch.micro 4 must be a multiple"),
        (["stages.ppo.ptx.ratio=0.25"], 8, "stages.ppo.ptx.ratio 0.25 x micro batch 8 = 2 must be a multiple"),
        (["stages.ppo.batch.micro=1", "stages.ppo.ptx.ratio=0.5"], 1, "ptx.ratio 0.5 x micro batch 1 = 0.5 must be"),
        (["stages.evaluate.batch.size=20"], 8, "stages.evaluate.batch.size 20 must be a multiple"),
        (["stages.pretrain.batch.length=33"], 1, "stages.pretrain.batch.length 33 is more than model.context 32"),
        (["stages.sft.batch.length=40"], 1, "stages.sft.batch.length 40 is more than model.context 32"),
        (["stages.reward.batch.length=40"], 1, "stages.reward.batch.length 40 is more than model.context 32"),
        (["stages.ppo.ptx.length=40"], 1, "stages.ppo.ptx.length 40 is more than model.context 32"),
        (["stages.ppo.sampling.max_new_tokens=25"], 1,
         "stages.ppo: batch.prompt_length 8 + sampling.max_new_tokens 25 = 33 is more than model.context 32"),
        (["stages.evaluate.sampling.max_new_tokens=25"], 1, "stages.evaluate: batch.prompt_length 8 + sampling"),
        (["mesh.sequence=3", "stages.pretrain.batch.length=30", "stages.ppo.ptx.length=30",
          "stages.sft.batch.length=15", "stages.evaluate=null", "stages.reward.batch.length=15"], 3,
         "= 16 must be a multiple of mesh.sequence 3"),
        (["mesh.sequence=8", "stages.sft.batch.length=12"], 8,
         "stages.sft.batch.length 12 must be a multiple of mesh.sequence 8"),
        (["mesh.tensor=2", "model.mlp_width=33"], 2, "model.mlp_width 33 must be a multiple of mesh.tensor 2"),
        (["mesh.slices=2", "mesh.data=3"], 3, "mesh.data 3 must be a multiple of mesh.slices 2"),
        (["stages.sft.mesh={fsdp: 8}", "stages.sft.batch.size=12"], 8,
         "stages.sft.batch.size 12 must be a multiple of stages.sft.mesh.data x stages.sft.mesh.fsdp = 1 x 8 = 8"),
        (["stages.ppo.mesh={tensor: 3}"], 8, "stages.ppo.mesh: fsdp 1 x sequence 1 x tensor 3 x expert 1 = 3 must "
         "divide the number of devices, 8"),
        (["mesh.fsdp=32", "stages={pretrain: {data: [{source: a}], steps: 1, batch: {size: 32, length: 8}, "
          "optimizer: {lr: 1}}}"], 32, "model.width 16 must be a multiple of mesh.fsdp 32"),
        (["model.architecture.head_dim=3"], 1, "rope turns pairs, so width / heads (or architecture.head_dim) must be "
         "even, got 3"),
        (["mesh.expert=2"], 2, "mesh.expert 2: this model has no experts to split; use mesh.data or mesh.fsdp"),
        (["mesh.expert=2", "model.family=mixtral", "stages.sft.batch.size=6"], 4,
         "stages.sft.batch.size 6 must be a multiple of mesh.data x mesh.fsdp x mesh.expert = 2 x 1 x 2 = 4"),
        (["mesh.expert=4", "model.family=mixtral", "model.architecture.experts.count=6"], 4,
         "experts.count 6 must be a multiple of mesh.expert 4"),
        (["model.family=mixtral", "model.architecture.experts={count: 2, per_token: 3}"], 1, "per_token 3 is more"),
        (["model.architecture.experts.per_token=3"], 1, "experts: per_token without experts; give count or another"),
        (["model.family=gpt2", "model.architecture.experts.count=2"], 1, "experts have a gate, got the act"),
        (["tokenizer={}"], 1, "tokenizer: give data (texts to train one on) or path"),
        (["model={checkpoint: x}"], 1, "tokenizer: a model from a checkpoint brings its own"),
        (["stages.sft=null"], 1, "stages.ppo needs a policy to start from; add stages.sft or model.checkpoint"),
        (["stages.sft=null"], 1, "stages.reward starts from sft; add stages.sft or model.checkpoint"),
        (["stages.reward=null"], 1, "stages.ppo needs a reward model; add stages.reward, or give other rewards"),
        (["stages.reward=null", "stages.ppo.rewards=[{length: {target: 4}}]"], 1,
         "stages.ppo.value starts from the reward model; add stages.reward, or set start_from: policy"),
        (["stages.pretrain=null", "stages.reward.start_from=pretrain"], 1, "stages.reward starts from pretrain"),
        (["stages.sft=null", "stages.ppo=null", "stages.reward.start_from=pretrain",
          "stages.reward.normalize.on=samples"], 1, "normalize.on: samples needs a policy to sample"),
        (["stages.pretrain=null", "stages.sft=null", "stages.ppo=null", "stages.reward=null"], 1,
         "stages.evaluate needs a model"),
        (["stages.ppo=null", "stages.reward=null", "stages.evaluate.comparisons=[{source: c}]"], 1,
         "stages.evaluate.comparisons measures the reward model; add stages.reward"),
        (["stages={}"], 1, "stages: nothing to run"),
        (["stages.pretrain.optimizer.warmup_steps=21"], 1,
         "stages.pretrain.optimizer.warmup_steps 21 is more than its 20 updates"),
        (["stages.ppo.optimizer.warmup_steps=41"], 1, "warmup_steps 41 is more than its 40 updates"),
        (["stages.ppo.sampling.stop_after=8"], 1, "stages.ppo.sampling.stop_after 8 must be below max_new_tokens 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit(load, overrides, devices, expected):
    assert expected in problem(load(*overrides), devices)


def test_a_single_problem_is_one_line_and_several_are_listed(load):
    assert "\n" not in problem(load("stages.sft.batch.size=12"), 8)
    lines = problem(load("stages.sft.batch.size=12", "stages.pretrain.batch.length=40"), 8).splitlines()
    assert lines[0] == "full: 2 problems"
    assert len(lines) == 3


def test_boundaries_are_allowed(load):
    check(load("stages.ppo.sampling.max_new_tokens=24"), 1)  # 8 + 24 = the context
    check(load("stages.ppo.optimizer.warmup_steps=40"), 1)  # 10 steps x 2 epochs x 2 minibatches


def test_a_checkpoint_brings_shape_and_tokenizer(load):
    run = load("model={checkpoint: runs/x}", "tokenizer={}", "stages.sft=null", "stages.pretrain=null")
    check(run, 1)
    check(load("model={checkpoint: runs/x}", "tokenizer={}", "stages.sft.batch.length=99"), 1)


def test_description_shows_what_is_derived(load):
    text = describe(load())
    for part in (
        "data 1 x fsdp 1 x sequence 1 x tensor 1 x expert 1 = 1 device (the fewest that fit",
        "20 steps of 16 sequences x 32 = 512 tokens per step, 10,240 in all; 2 micro batches of 8 accumulated",
        "2 epochs of 8 sequences x 16 = 128 tokens per step; no accumulation",
        "5 steps of 8 prompts x up to 4 responses of up to 16 tokens = up to 48 pairs per step",
        "10 steps x 32 rollouts = 320 episodes; 2 epochs of 2 minibatches of 16 = 4 updates per step, 40 in all",
        "2 micro batches of 8 accumulated; up to 8 + 8 = 16 tokens",
        "ptx: 32 sequences x 32 = 1,024 tokens per update",
        "512 samples in 32 batches of 16",
    ):
        assert part in text
    assert "data 4 x fsdp 1 x sequence 1 x tensor 1 x expert 1 = 4 devices\n" in describe(load(), 4)
    mixture = describe(load("model.family=mixtral", "model.architecture.experts.count=4"))
    # three matrices of 16 x 32 an expert, in 2 layers, 2 of 4 at rest: 6,144 parameters fewer
    assert "4 experts with 32 inside, 2 per token, context 32; 16,080 parameters, 9,936 active\n" in mixture
    assert "from checkpoint runs/x" in describe(load("model={checkpoint: runs/x}", "tokenizer={}"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.ppo.kl={controller: adaptive, horizon: 6.4}"], "horizon 6.4 is in episodes, and one step has 32"),
        (["stages.ppo.kl={controller: adaptive, horizon: 3.0}"], "give more than 6.4"),
        (["stages.ppo.kl={controller: adaptive, coef: 0.0}"], "0 stays 0; give coef above 0"),
    ],
)
def test_a_controller_that_would_turn_or_stay_at_zero_is_refused(load, overrides, said):
    # 1 - 0.2 x 32 / 6.4 = 0: fails without the check, with a coefficient that changes its sign: seen
    assert said in problem(load(*overrides))


def test_a_controller_may_move_fast_and_a_fixed_coefficient_may_be_zero(load):
    check(load("stages.ppo.kl={controller: adaptive, horizon: 6.5}"), 1)
    check(load("stages.ppo.kl={controller: fixed, coef: 0.0, horizon: 3.0}"), 1)


@pytest.mark.parametrize("temperature", ["0", "1e-38", "0.009", "101", "1e300"])
def test_ppo_wants_samples_that_differ(load, temperature):
    with pytest.raises(
        ConfigError, match=r"sampling.temperature .* needs samples of the policy that differ, give 0.01 to 100"
    ):
        load(f"stages.ppo.sampling.temperature={temperature}")
    check(load(f"stages.evaluate.sampling.temperature={temperature}", "stages.ppo.sampling.temperature=0.01"), 1)


@pytest.mark.parametrize("setting", ["top_k=2", "top_p=0.9", "min_p=0.05"])
def test_ppo_takes_no_filters(load, setting):
    # what they leave is another distribution than that of every log-probability in the update
    with pytest.raises(ConfigError, match=r"top_k .*, top_p .* and min_p .* must be off .* sample from another one"):
        load(f"stages.ppo.sampling.{setting}")
    check(load(f"stages.evaluate.sampling.{setting}"), 1)


def test_a_warm_up_is_checked_when_epochs_are_counted(load):
    run = load("stages.sft.optimizer.warmup_steps=38")
    check(run, 1)  # nobody knows yet how many updates two epochs are
    check_updates("sft", run.stages.sft.optimizer, 38)
    with pytest.raises(ConfigError, match=r"stages.sft.optimizer.warmup_steps 38 is more than its 37 updates; give fe"):
        check_updates("sft", run.stages.sft.optimizer, 37)


def test_sizes_of_a_checkpoint_are_checked_like_those_of_a_configuration(load):
    run = load("model={checkpoint: runs/x}", "tokenizer={}", "mesh={fsdp: 4, tensor: 4}")
    held = {"width": 18, "mlp_width": 18, "experts": 0}
    with pytest.raises(ConfigError) as caught:
        check(run, 16, held)
    lines = str(caught.value).splitlines()[1:]
    assert "model.checkpoint: mlp_width 18 must be a multiple of mesh.tensor 4" in lines[0]
    assert "model.checkpoint: width 18 must be a multiple of mesh.fsdp 4" in lines[1]
    check(run, 16)  # where nobody knows them


def test_meshes_that_would_do_are_named(load):
    sft_alone = "stages={sft: {data: [{source: a}], steps: 1, batch: {size: 8, length: 8}, optimizer: {lr: 1}}}"
    assert problem(load(sft_alone, "mesh={data: 4, fsdp: 4}"), 16).endswith(
        "(of 16 devices fit data 2 x fsdp 4 x tensor 2, data 2 x fsdp 4 x sequence 2, data 4 x fsdp 2 x tensor 2)"
    )
    assert "(of 8 devices fit data 2 x fsdp 4, data 4 x fsdp 2, fsdp 8)" in problem(load(sft_alone, "mesh.fsdp=3"), 8)
    few = "stages={sft: {data: [{source: a}], steps: 1, batch: {size: 1, length: 7}, optimizer: {lr: 1}}}"
    told = problem(load(few, "mesh.data=3", "model.mlp_width=32"), 3)
    assert told.endswith("(no mesh of 3 devices does; of 1 device fit data 1)")


def test_every_stage_may_have_a_mesh_of_its_own(load):
    run = load("mesh={data: 2, tensor: 4}", "stages.sft.mesh={fsdp: 8}", "stages.sft.mesh.slices=1")
    check(run, 8)
    assert run.mesh.of("sft").axes | {"data": 1} == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1, "expert": 1}
    assert run.mesh.of("ppo") is run.mesh
    assert "sft.mesh" in describe(run, 8)
    assert least_devices(run.mesh) == 8
    own = load("stages.sft.mesh={fsdp: 8, offload: moments}")
    assert [own.mesh.of(stage).offloads("moments") for stage in ("sft", "ppo")] == [True, False]
    assert not own.mesh.of("sft").offloads("frozen")
    assert "8 devices, moments in their hosts' memory" in describe(own, 8)
    assert problem(load("stages.stf.mesh={fsdp: 8}"), 8).startswith(
        "stages.stf.mesh: stf is no stage; expected one of "
    )
