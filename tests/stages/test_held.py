"""What a stage holds while it learns: its state, and nothing of what it started from."""

import shutil
from collections import Counter

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from rlhfjax.stages import offline
from rlhfjax.training.checkpoint import Checkpoints
from stages.tiny_recipe import STEPS

DOWN = 2, 32, 16  # of a matrix that every model has once: layers, the width of the feed-forward block and its own
COPIES = {"pretrain": 4, "sft": 3, "reward": 4}  # parameters, two moments, and an average where one is kept


@pytest.fixture
def held():
    """Counts by shape the arrays on all devices that are there and were not when the test began."""
    old = jax.live_arrays()  # kept, so that no other array gets the id of one of them
    before = {id(array) for array in old}

    def count():
        new = [array for array in jax.live_arrays() if id(array) not in before and not array.is_deleted()]
        return Counter(array.shape for array in new if len(array.devices()) > 1)

    return count


def counting(monkeypatch, module, name, count, found):
    """Have each call of a function note first what is held."""
    function = getattr(module, name)

    def counted(*args, **kwargs):
        found.append(count()[DOWN])
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("stage", COPIES)
def test_an_offline_stage_holds_its_state_alone(config, copied, held, monkeypatch, stage):
    # meant to catch the parameters that a stage began with beside those that it trains
    run_dir, steps, loop = copied(stage), [], offline.train_offline

    def watched(step, *args, **kwargs):
        def first(*inputs):
            steps.append(held()[DOWN])
            return step(*inputs)

        return loop(first, *args, **kwargs)

    monkeypatch.setattr(offline, "train_offline", watched)
    run_recipe(load_config(str(config)), run_dir, only=stage)
    assert steps == [COPIES[stage]] * STEPS


@pytest.mark.parametrize("stage", COPIES)
def test_a_stage_that_goes_on_lets_go_what_it_started_from_before_it_reads(
    config, finished, tmp_path, held, monkeypatch, stage
):
    # meant to catch a fresh state, or the parameters for one, beside the state that is read
    run_dir, first, reads = tmp_path / "run", [], []
    shutil.copytree(finished, run_dir)
    (run_dir / stage / "complete.json").unlink()
    shutil.rmtree(run_dir / stage / "checkpoints" / str(STEPS))
    counting(monkeypatch, offline, "init_state", held, first)
    counting(monkeypatch, Checkpoints, "restore", held, reads)
    run_recipe(load_config(str(config)), run_dir, only=stage)
    assert (first, reads) == ([], [0])
