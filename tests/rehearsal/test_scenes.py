"""Which faults there are, whom they hit, and what is heard of them."""

from pathlib import Path

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.faults import read_faults
from rlhfjax.rehearsal.scenes import SCENES, USUAL, cast, chosen, says


def test_twenty_are_usual_and_all_are_to_be_had():
    assert len(chosen(None)) == len(USUAL) == 20
    assert [scene.name for scene in chosen("all")] == list(SCENES)
    assert [scene.name for scene in chosen("stop, kill,stop")] == ["stop", "kill"]
    with pytest.raises(ConfigError, match="got 'kil'; did you mean kill"):
        chosen("stop,kil")


def test_the_document_has_all_of_them():
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = text[text.index("## A rehearsal") : text.index("## Several processes")]
    assert [name for name in SCENES if f"`{name}`" not in section] == []


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("seed", range(4))
def test_a_scene_hits_a_process_that_is_there_the_same_one_each_time(name, seed):
    one = cast(SCENES[name], seed, 5, "sft")
    assert one == cast(SCENES[name], seed, 5, "sft")
    assert one.process in (range(1) if one.scene.who == "first" else range(1, 5))
    for fault in read_faults(one.filled(one.scene.fault), allowed=True):
        assert fault.process == one.process
        assert fault.point in ("sft", "save", "commit", "data")
    assert bool(one.scene.fault) != bool(one.scene.node)


def test_seeds_hit_different_processes():
    assert len({cast(SCENES["stop"], seed, 16, "sft").process for seed in range(20)}) > 5


LINES = [
    "process 1: another process is gone, see its log: Gloo all-reduce failed",
    "error: process 2 (h, cpu:2, pid 7) says nothing since 14 s (stopped by a signal); last it was in sft step 4, sft",
]


def test_a_line_counts_only_where_it_names_the_process_that_was_hit():
    seeds = {cast(SCENES["stop"], seed, 5, "sft").process: seed for seed in range(20)}
    heard = {process: says(cast(SCENES["stop"], seed, 5, "sft"), LINES) for process, seed in seeds.items()}
    assert heard == {process: LINES[1] if process == 2 else None for process in range(1, 5)}
    assert says(cast(SCENES["kill"], 0, 5, "sft"), LINES) is None
