"""Every item of what a checkpoint keeps is needed: a run that resumes without one of them ends elsewhere.

This is a test of the resume tests. A stage continues from the checkpoint before its last step, once as it is and once
for each item with that item forgotten, that is, as a stage that begins would have it. Only the first may end in the
metrics, samples and checkpoint of the run that was never interrupted.
"""

import re
import shutil
from functools import partial
from pathlib import Path

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.data.by_step import Batches
from rlhfjax.runs.checks import execute
from rlhfjax.sharding import make_mesh
from rlhfjax.stages import learning, offline, online
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Learning
from rlhfjax.training.checkpoint import stored_digests
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.types import PromptBatch, TokenBatch
from stages.conftest import rows_of
from stages.once import once
from stages.tiny_recipe import STAGES, STEPS

SFT = pytest.param("sft", marks=pytest.mark.faults)  # what PPO keeps is more
QUICK = ("policy", "value model", "KL coefficient")  # in every run; that the list has every array is there, too
BEFORE = STEPS - 1  # where runs resume
OVERRIDES = {
    "sft": ["checkpoints.keep=9", "stages.sft.select_by=last", "stages.sft.optimizer.ema_decay=0.9"],
    "ppo": ["checkpoints.keep=9"],
}
# The arrays of a state by what they are. What guards count is zero here; tests of guards see that it is kept.
ARRAYS = {
    "ppo": {
        "policy": r"\.train\.params\['policy'\]",
        "value model": r"\.train\.params\['value'\]",
        "average": r"\.train\.average",
        **{
            f"{what} of the {model}'s optimizer": rf"\.train\.optimizer.*\['{model}'\].*\.{name}\b"
            for model in ("policy", "value")
            for what, name in (("first moments", "mu"), ("second moments", "nu"), ("counts", "count"))
        },
        "updates": r"\.train\.step",
        "KL coefficient": r"\.kl_coef",
        "iteration": r"\.iteration",
    },
    "sft": {
        "policy": r"\.params",
        "average": r"\.average",
        "first moments": r"\.optimizer.*\.mu\b",
        "second moments": r"\.optimizer.*\.nu\b",
        "counts": r"\.optimizer.*\.count\b",
        "step": r"\.step",
    },
}
COUNTED = r"(\.train)?\.skipped"


@pytest.fixture(scope="module")
def run_stage(config):
    """Runs one stage in a directory, on one device; `forget` maps the restored state and a fresh one to another."""
    shared, module, programs = {}, {"sft": offline, "ppo": online}, once({})

    def ran(run_dir, stage, forget=None, overrides=()):
        run = load_config(config, [*OVERRIDES[stage], *overrides])
        mesh = make_mesh(devices=jax.devices()[:1])
        job = Job(run, stage, run_dir, Path(run.data_dir), mesh, lambda _: None, shared)
        restored = Learning._restored

        def forgetful(self):
            state, *rest = restored(self)
            return forget(state, self._fresh(self._begun.whole())) if forget else state, *rest

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learning, "_restored", forgetful)
            patch.setattr(module[stage], "Ahead", programs)
            return execute(job)

    return ran


@pytest.fixture(scope="module")
def straight(finished, run_stage, tmp_path_factory):
    """Directories with a stage that went through without a break, and where each run copies it to."""
    made = {}

    def of(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("straight") / stage
            for name in STAGES[: STAGES.index(stage)]:
                shutil.copytree(finished / name, made[stage] / name)
            (made[stage] / stage).mkdir()
            run_stage(made[stage], stage)
        return made[stage]

    return of


@pytest.fixture
def resumed(straight, run_stage, tmp_path):
    """Continues a stage from its last checkpoint but one; whether it ends as the run without a break."""

    def ends_the_same(stage, forget=None):
        one, run_dir = straight(stage), tmp_path / "run"
        gone = shutil.ignore_patterns(str(STEPS), "complete.json", "tensorboard")
        for name in STAGES[: STAGES.index(stage)]:
            run_dir.mkdir(exist_ok=True)
            (run_dir / name).symlink_to(one / name)
        shutil.copytree(one / stage, run_dir / stage, ignore=gone)
        assert (run_dir / stage / "checkpoints" / str(BEFORE)).exists()
        run_stage(run_dir, stage, forget)
        return outcome(run_dir / stage) == outcome(one / stage)

    return ends_the_same


def outcome(stage_dir):
    """Metrics but those of time, samples, and the digests of all arrays of the last checkpoint."""
    rows = rows_of(stage_dir / "metrics.jsonl")
    kept = [{name: row[name] for name in row if not name.startswith(("timing/", "perf/"))} for row in rows]
    digests = stored_digests(stage_dir / "checkpoints" / str(STEPS))
    assert digests
    return kept, rows_of(stage_dir / "samples.jsonl"), digests


def forgotten(pattern):
    """The restored state with the arrays of an item as they are in a fresh one."""

    def forget(state, fresh):
        def chosen(path, restored, new):
            return new if re.match(pattern, jax.tree_util.keystr(path)) else restored

        return jax.tree_util.tree_map_with_path(chosen, state, fresh)

    return forget


@pytest.mark.parametrize("stage", [SFT, "ppo"])
def test_with_every_item_it_ends_the_same(resumed, stage):
    assert resumed(stage)


@pytest.mark.parametrize("stage", [SFT, "ppo"])
def test_every_array_of_a_state_belongs_to_an_item(resumed, stage):
    # fails when a state gets an array that nobody has put into the list above
    found = []

    def look(state, _):
        found.extend(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
        return state

    resumed(stage, look)
    patterns = [*ARRAYS[stage].values(), COUNTED]
    assert [path for path in found if sum(bool(re.match(pattern, path)) for pattern in patterns) != 1] == []
    assert [pattern for pattern in patterns if not any(re.match(pattern, path) for path in found)] == []


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        pytest.param(
            *(stage, pattern),
            id=f"{stage}: {name}",
            marks=SFT.marks if stage == "sft" else () if name in QUICK else pytest.mark.faults,
        )
        for stage, items in ARRAYS.items()
        for name, pattern in items.items()
    ],
)
def test_without_an_array_it_ends_elsewhere(resumed, stage, pattern):
    assert not resumed(stage, forgotten(pattern))


def test_the_best_step_is_remembered(finished, run_stage, tmp_path, monkeypatch):
    # the highest loss counts as the best here, so that it is not the last; fails when the scores are not kept: meant
    monkeypatch.setattr(offline, "_selection_score", lambda select, measured: measured["loss/validation"])
    overrides = ["stages.sft.select_by=validation_loss", "checkpoints.keep=1"]

    def kept(stage_dir):
        return sorted(path.name for path in (stage_dir / "checkpoints").iterdir())

    for name in STAGES[: STAGES.index("sft")]:
        for place in ("straight", "resumed"):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / name).symlink_to(finished / name)
    (tmp_path / "straight" / "sft").mkdir()
    assert run_stage(tmp_path / "straight", "sft", overrides=overrides)["step"] == 2
    assert kept(tmp_path / "straight" / "sft") == ["2", str(STEPS)]
    gone = shutil.ignore_patterns(str(STEPS), "tensorboard")
    shutil.copytree(tmp_path / "straight" / "sft", tmp_path / "resumed" / "sft", ignore=gone)
    assert run_stage(tmp_path / "resumed", "sft", overrides=overrides)["step"] == 2
    assert kept(tmp_path / "resumed" / "sft") == ["2", str(STEPS)]


def reads_from_the_start(patch, kind):
    iterate = Batches.iterate
    patch.setattr(Batches, "iterate", lambda self, start: iterate(self, 0 if self.make is kind else start))


def other_keys(patch):
    key = Job.key
    patch.setattr(Job, "key", lambda self, use: jax.random.fold_in(key(self, use), 1))


def rows_from(patch, shift):
    patch.setattr(
        learning, "MetricsWriter", lambda at, start, *more, **also: MetricsWriter(at, start + shift, *more, **also)
    )


@pytest.mark.parametrize(
    ("stage", "mutation"),
    [
        pytest.param("ppo", partial(reads_from_the_start, kind=PromptBatch), id="place in the prompts"),
        pytest.param(
            *("ppo", partial(reads_from_the_start, kind=TokenBatch)),
            id="place in the documents of ptx",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            *("sft", partial(reads_from_the_start, kind=TokenBatch)), id="place in the demonstrations", marks=SFT.marks
        ),
        pytest.param("ppo", other_keys, id="keys of sampling and shuffling"),
        pytest.param("sft", other_keys, id="keys of dropout", marks=SFT.marks),
        pytest.param("ppo", partial(rows_from, shift=1), id="a row twice", marks=pytest.mark.faults),
        pytest.param("sft", partial(rows_from, shift=-1), id="a row missing", marks=SFT.marks),
    ],
)
def test_without_what_follows_from_the_step_it_ends_elsewhere(resumed, straight, monkeypatch, stage, mutation):
    straight(stage)  # that one goes through as it is
    mutation(monkeypatch)
    assert not resumed(stage)
