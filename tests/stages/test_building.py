"""Programs built from a configuration alone are those that a run of it calls."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.config.recipe import FACTS
from rlhfjax.layout import laid_out_by
from rlhfjax.runs.checks import execute
from rlhfjax.sharding import make_mesh
from rlhfjax.sharding.activations import layout_of
from rlhfjax.stages import offline, online
from rlhfjax.stages.batches import longest, open_batches
from rlhfjax.stages.building import Vocabulary, build
from rlhfjax.stages.compilation import Ahead
from rlhfjax.stages.job import Job
from rlhfjax.stages.measures.responses import sampler
from rlhfjax.stages.models import sampling_params
from rlhfjax.target import current, target_of

ONE = {"devices": 1}
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
ADAPTED = ["model.lora={rank: 2, alpha: 8.0, targets: [mlp/up]}"]
ROLLOUTS = "data: [{source: PROMPTS}], steps: 1, batch: {size: 16, prompt_length: 10, overlong: drop}"
SAMPLING = "sampling: {max_new_tokens: 8, temperature: 0.7}, optimizer: {lr: 1e-3}"
GRPO = f"stages.grpo={{{ROLLOUTS}, {SAMPLING}, groups: {{size: 4, draws: 2}}, rewards: [{{length: {{target: 4}}}}]}}"
DPO = (
    "stages.dpo={data: [{source: COMPARISONS}], steps: 1, optimizer: {lr: 1e-3}, "
    "batch: {size: 8, length: 24, candidates: 4, overlong: drop}}"
)


class Reached(BaseException):
    """The stage has what it would run."""


def on(mesh):
    devices = mesh.get("devices")
    return make_mesh(devices=jax.devices()[:devices]) if devices else make_mesh(**mesh)


def texts_of_the_run(job, monkeypatch):
    """The programs that a stage has compiled when it has come to its loop, as they were lowered."""
    found = {}

    class Kept(Ahead):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._compiler = SimpleNamespace(submit=lambda _: None)  # nothing is called: lowered is enough

        def _later(self, function, arguments):
            found[len(found)] = super()._later(function, arguments)
            return found[len(found) - 1]

    def stop(*_, **__):
        raise Reached

    for module, loop in ((offline, "train_offline"), (online, "train_online")):
        monkeypatch.setattr(module, "Ahead", Kept)
        monkeypatch.setattr(module, loop, stop)
    with pytest.raises(Reached):
        execute(job)
    return [program._lowered.result().as_text() for program in found.values()]


def vocabulary_of(job):
    t = job.tokenizer
    return Vocabulary(t.vocab_size, t.end_ids, t.pad_id, t.eos_id if t.bos_id is None else t.bos_id)


def built_beside(job):
    """The same from the configuration, with what is the data's."""
    train = open_batches(job)
    sizes = {"longest": longest(train)} if train["train"].longest else {}
    return build(job.run, job.stage, job.mesh, current(), vocabulary_of(job), **sizes)


@pytest.mark.parametrize(
    ("stage", "mesh", "settings"),
    [
        ("pretrain", ONE, []),
        pytest.param("sft", EIGHT, ADAPTED, marks=pytest.mark.slow),
        ("reward", EIGHT, []),
        pytest.param("dpo", ONE, [DPO], marks=pytest.mark.slow),
        ("ppo", EIGHT, []),
        pytest.param("grpo", EIGHT, [*ADAPTED, "stages.ppo=null", GRPO], marks=pytest.mark.slow),
    ],
)
def test_they_are_those_of_the_run(stage, mesh, settings, config, copied, monkeypatch):
    # fails when shapes or layouts, sampling, packing or the schedule are others than the stage's
    written = str(config.parent / "prompts.jsonl"), str(config.parent / "comparisons.jsonl")
    settings = [text.replace("PROMPTS", written[0]).replace("COMPARISONS", written[1]) for text in settings]
    run = load_config(config, settings)
    job = Job(run, stage, copied("ppo" if stage in ("dpo", "grpo") else stage), Path(run.data_dir), on(mesh), print, {})
    ran = texts_of_the_run(job, monkeypatch)
    built = built_beside(job)
    called = ["reshard", "rollout", "score", "estimate", "update"] if FACTS[stage].online else ["step"]
    assert [built[name].lower().as_text() for name in called] == ran
    others = {"grpo": {"informative", "merged"}, "ppo": set(), "dpo": set()}.get(stage, {"validation"})
    assert all(built.pop(name).lower() for name in others)
    assert sorted(built) == sorted(called)


def test_those_of_an_evaluation_are(config, finished):
    run = load_config(config)
    job = Job(run, "evaluate", finished, Path(run.data_dir), on(EIGHT), print, {})
    c, policy, reference = job.config, job.load("ppo"), job.load("sft")
    how = policy, reference, job.load("reward"), sampling_params(c.sampling, job.tokenizer)
    respond = sampler(c, job.mesh, *how)
    prompts = next(job.put(iter([open_batches(job)["train"][0]])))
    built = built_beside(job)
    with laid_out_by(layout_of(job.mesh)):
        ran = respond.func.lower(*respond.args, prompts, job.key("samples")).as_text()
    assert built["responses/ppo"].lower().as_text() == ran
    assert built.keys() == {"responses/sft", "responses/ppo", "losses"}


def test_a_configuration_is_enough(tmp_path, monkeypatch):
    """A model of 30 billion parameters in a folder with nothing in it, in the thread that asks."""
    monkeypatch.chdir(tmp_path)
    held, threads = jax.live_arrays(), threading.active_count()  # kept, so that no other array gets the id of one
    here = {id(array) for array in held}
    shape = ["model.family=llama", "model.layers=60", "model.width=6656", "model.heads=52", "model.mlp_width=17920"]
    run, mesh = load_config("quickstart", shape), on({"fsdp": 8})
    built = build(run, "reward", mesh, target_of(mesh), Vocabulary(32_000))
    assert sum(leaf.size for leaf in jax.tree.leaves(built["step"].arguments[0].params)) > 30e9
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in here) < 1e6
    assert (list(tmp_path.iterdir()), threading.active_count()) == ([], threads)


def test_sizes_are_those_of_the_target(config):
    mesh = on(EIGHT)
    text = {}
    for tokens in (8, 4096):
        target = replace(target_of(mesh), part_tokens=tokens)
        built = build(load_config(config), "ppo", mesh, target, Vocabulary(320))
        text[tokens] = built["score"].lower().as_text()
    assert text[8] != text[4096]
