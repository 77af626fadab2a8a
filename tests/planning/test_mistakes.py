"""Mistakes that people make with pods: each is refused or flagged before anything compiles, most with what would do."""

from dataclasses import dataclass, field

import pytest

from rlhfjax.config import load_config
from rlhfjax.errors import ConfigError
from rlhfjax.planning.answer import asked
from rlhfjax.planning.assumed import Assumed
from rlhfjax.planning.changes import changed_by
from rlhfjax.planning.plan import refuse
from rlhfjax.planning.repairs import arithmetic, repairs, wastes

# A recipe for 8 devices, of which each mistake changes something.
GOOD = (
    *("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.width=128", "model.heads=8", "model.kv_heads=4"),
    *("model.mlp_width=256", "stages.pretrain.batch.size=32", "stages.sft.batch.size=32"),
    *("stages.reward.batch.size=32", "stages.ppo.batch.size=64", "stages.ppo.batch.minibatch=32"),
    *("stages.evaluate.batch.size=64",),
)


@dataclass(frozen=True)
class Mistake:
    overrides: tuple[str, ...]
    said: str
    topology: str | None = None
    slices: int = 1
    remedy: bool = True
    flagged: bool = False  # it would run, and waste the machine
    name: str = "quickstart"
    good: tuple[str, ...] = field(default=GOOD)


PODS = {"name": "llama3_8b_ppo", "good": ()}
MISTAKES = {
    "mesh larger than the machine": Mistake(("mesh.data=4",), "= 16, expected the number of devices, 8"),
    "mesh smaller than the machine": Mistake(("mesh.data=1",), "= 4, expected the number of devices, 8"),
    "mesh that does not divide it": Mistake(("mesh.data=-1", "mesh.tensor=3"), "must divide the number of devices"),
    "tensor of an odd size": Mistake(("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=7"), "expected the number of devices"),
    "heads that tensor does not divide": Mistake(
        ("model.heads=6", "model.kv_heads=6", "model.width=96", "mesh.tensor=4", "mesh.data=1"),
        "each device computes all heads", flagged=True,
    ),
    "keys and values fewer than tensor": Mistake(
        ("model.kv_heads=2", "mesh.tensor=4", "mesh.data=1"), "holds keys and values of all heads", flagged=True
    ),
    "sequence that splits no heads": Mistake(
        ("model.heads=4", "model.kv_heads=4", "mesh.fsdp=1", "mesh.data=1", "mesh.sequence=4"),
        "repeat its attention", flagged=True,
    ),
    "width that fsdp does not divide": Mistake(
        ("model.width=132", "model.heads=6", "model.kv_heads=2", "mesh.fsdp=8", "mesh.data=1", "mesh.tensor=1"),
        "must be a multiple of mesh.fsdp 8",
    ),
    "mlp that tensor does not divide": Mistake(("model.mlp_width=250", "mesh.tensor=4", "mesh.data=1"),
                                               "must be a multiple of mesh.tensor 4"),
    "experts of a dense model": Mistake(("mesh.expert=2", "mesh.data=1"), "no experts to split"),
    "batch of SFT smaller than rows": Mistake(("stages.sft.batch.size=2",), "must be a multiple of"),
    "batch of SFT no multiple of rows": Mistake(("stages.sft.batch.size=30",), "make it 28 or 32"),
    "prompts of the reward model fewer than rows": Mistake(("stages.reward.batch.size=2",), "stages.reward.batch.size"),
    "rollouts no multiple of rows": Mistake(
        ("stages.ppo.batch.size=66", "stages.ppo.batch.minibatch=33"), "stages.ppo.batch.size 66"
    ),
    "minibatch smaller than rows": Mistake(("stages.ppo.batch.minibatch=2",), "stages.ppo.batch.minibatch 2"),
    "micro batch smaller than rows": Mistake(("stages.ppo.batch.micro=2",), "stages.ppo.batch.micro 2"),
    "samples of an evaluation fewer than rows": Mistake(("stages.evaluate.batch.size=6",), "evaluate.batch.size"),
    "rollout longer than the cache": Mistake(("stages.ppo.sampling.max_new_tokens=5000",), "more than model.context"),
    "prompt longer than the cache": Mistake(("stages.ppo.batch.prompt_length=5000",), "is more than model.context"),
    "rows longer than the context": Mistake(("stages.sft.batch.length=4096",), "is more than model.context"),
    "two mistakes at once": Mistake(("mesh.data=4", "stages.sft.batch.length=4096"), "expected the number"),
    "slices that do not split data": Mistake(("mesh.data=1", "mesh.fsdp=16", "mesh.tensor=8"), "mesh.data 1",
                                             topology="v5p:4x4x4", slices=2, **PODS),
    "slices that the machine does not have": Mistake(("mesh.slices=4", "mesh.data=4", "mesh.tensor=1"), "mesh.slices",
                                                     topology="v5p:4x4x4", **PODS),
    "tensor over slices": Mistake(("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=16"), "mesh.data 1",
                                  topology="v5p:4x4x4", slices=2, **PODS),
    "a mesh for another pod": Mistake(("mesh.fsdp=64", "mesh.tensor=8"), "must divide the number of devices",
                                      topology="v5p:4x4x4", **PODS),
    "two devices a chip forgotten": Mistake(("mesh.data=1", "mesh.fsdp=16", "mesh.tensor=8"), "expected the number",
                                            topology="tpu7x:4x4x8", **PODS),
    "rows than more devices": Mistake(("mesh.data=1", "mesh.fsdp=256", "mesh.tensor=1"), "must be a multiple of",
                                      topology="v5e:16x16", **PODS),
    "a pod that nobody builds": Mistake((), "KIND:SIZES", topology="v5p:4by4", remedy=False, **PODS),
    "a chip that is none": Mistake((), "expected a kind among", topology="v12:4x4", remedy=False, **PODS),
    "warm-up longer than the stage": Mistake(("stages.ppo.optimizer.warmup_steps=9999",), "warmup_steps", remedy=False),
}  # fmt: skip


def question_of(mistake):
    run = load_config(mistake.name, [*mistake.good, *mistake.overrides])
    devices = None if mistake.topology else 8
    how = {"programs": None, "assumed": Assumed(), "say": lambda _: None}
    return asked(run, mistake.topology, devices, mistake.slices, **how)


def test_there_are_thirty_and_twenty_five_have_a_remedy():
    assert len(MISTAKES) == 30
    assert sum(mistake.remedy for mistake in MISTAKES.values()) >= 25


@pytest.mark.parametrize("name", MISTAKES)
def test_each_is_refused_or_flagged_with_what_would_do(name):
    mistake = MISTAKES[name]
    if mistake.flagged:
        question = question_of(mistake)
        assert any(mistake.said in waste for waste in wastes(question.run, question.machine.devices))
        found = repairs(question.run, question.machine.devices, question.machine.slices)
    else:
        with pytest.raises(ConfigError) as told:
            refuse(question_of(mistake))
        said, *changes = str(told.value).split("\n  change: ")
        assert mistake.said in said
        found = [tuple(change.split()) for change in changes]
    assert bool(found) == mistake.remedy
    for overrides in found:  # as they would be pasted
        question = question_of(mistake)
        changed = changed_by(question.run, overrides)
        arithmetic(changed, question.machine.devices, question.checkpoint)
        assert not list(wastes(changed, question.machine.devices))


GOOD_ONES = [
    ("quickstart", GOOD, None, 1),
    ("quickstart", (*GOOD, "mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1"), None, 1),
    ("quickstart", (*GOOD, "mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1"), None, 1),
    ("quickstart", (*GOOD, "mesh.data=2", "mesh.fsdp=1", "mesh.tensor=4"), None, 1),
    ("quickstart", (*GOOD, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=1", "mesh.sequence=2"), None, 1),
    ("quickstart", (*GOOD, "stages.ppo.batch.micro=8"), None, 1),
    ("quickstart", (*GOOD, "mesh.offload=all"), None, 1),
    *(
        ("llama3_8b_ppo", (), topology, slices)
        for topology, slices in (("v5p:4x4x4", 1), ("v5e:8x8", 1), ("v6e:8x8", 1), ("tpu7x:4x4x2", 1), ("h100:8x8", 1))
    ),
    ("llama3_8b_ppo", ("mesh.data=2",), "v5p:4x4x4", 2),
    ("llama3_8b_ppo", ("mesh.fsdp=128",), "v5p:8x8x8", 1),
    ("llama3_70b_ppo", (), "v5p:8x8x8", 1),
    ("llama3_70b_ppo", ("mesh.data=2",), "v5p:8x8x8", 2),
    ("llama3_70b_ppo", ("mesh.fsdp=8",), "h100:8x8", 1),
    ("qwen3_30b_a3b_ppo", (), "v5p:4x4x4", 1),
    ("instructgpt_175b", (), "v5p:8x8x8", 1),
    ("llama3_8b_grpo", (), "v5p:4x4x4", 1),
]


def test_there_are_twenty_good_ones():
    assert len(GOOD_ONES) == 20


@pytest.mark.parametrize(("name", "overrides", "topology", "slices"), GOOD_ONES)
def test_none_that_is_good_is_refused(name, overrides, topology, slices):
    question = question_of(Mistake(overrides, "", topology, slices, name=name, good=()))
    refuse(question)
