"""Which models and data share a row, and how many rows go through them together."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import ppo_config, tiny

from rlhfjax.algorithms.packing import row_width
from rlhfjax.config.sections import RankedBatch
from rlhfjax.data.token_rows import Ragged, RankedRows
from rlhfjax.models import EncoderDecoder, EncoderDecoderConfig
from rlhfjax.sharding import make_mesh
from rlhfjax.stages.packed_rows import ranking_packer, responses_a_row, rows_at_a_time
from rlhfjax.target import building_for, target_of

LONGEST = 40
ONE, EIGHT = (make_mesh(devices=jax.devices()[:count]) for count in (1, 8))


def rows_of(model, mesh=ONE, longest=LONGEST, **batch):
    """How many rows of which width hold comparisons; None where candidates have rows of their own."""
    section = RankedBatch(**({"size": 64, "length": 30} | batch))
    made = ranking_packer(section, mesh, model, longest)
    return None if made is None else made.args[:2]


def test_comparisons_share_a_row_of_the_longest_one_of_all_data():
    model = tiny()
    assert rows_of(model) == (13, LONGEST)  # 512 tokens
    assert rows_of(model, size=4) == (4, LONGEST)
    assert rows_of(model, micro=2) == (2, LONGEST)
    assert rows_of(model, micro=2, mesh=EIGHT) == (8, LONGEST)  # every device has some


@pytest.mark.parametrize(
    "model",
    [tiny("mistral"), EncoderDecoder(EncoderDecoderConfig(16, 2, 16, 4, 24, 32, 1))],
    ids=["window", "two halves"],
)
def test_models_that_cannot_share_a_prompt_read_candidates_one_a_row(model):
    assert rows_of(model) is None
    assert responses_a_row(ppo_config(), 4, tiny(width=64), model) == 1


def test_rows_are_at_most_four_times_as_long_as_the_model_is_wide():
    assert rows_of(tiny(), longest=64) == (8, 64)
    assert rows_of(tiny(), longest=65) is None
    # 5 prompt tokens and n responses of 6 with the prompt's last token each: 4 + 7 n
    assert responses_a_row(ppo_config(), 8, tiny(), tiny()) == 8  # 60
    assert responses_a_row(ppo_config(), 12, tiny(), tiny()) == 6  # 88 would be too long
    assert responses_a_row(ppo_config(), 11, tiny(), tiny()) == 1
    assert responses_a_row(ppo_config(), 1, tiny(), tiny()) == 1


def test_devices_that_share_tokens_have_as_many_each():
    mesh = make_mesh(data=1, sequence=4, devices=jax.devices()[:4])
    assert rows_of(tiny(), mesh, longest=37) == (13, 40)
    assert [row_width(5, 5, group, multiple=4) for group in (1, 2)] == [12, 16]  # of 10 and 16


def test_kernels_share_prompts_too():
    with building_for(target_of([SimpleNamespace(platform="tpu")])):
        assert rows_of(tiny()) == (64, LONGEST)
        assert responses_a_row(ppo_config(), 8, tiny(), tiny()) == 8


def test_rows_of_groups_are_fewer():
    c = ppo_config(batch={"size": 48, "epochs": 1, "prompt_length": 5})
    assert rows_at_a_time(c, ONE) == 47  # 512 tokens of rows of 11
    assert rows_at_a_time(c, ONE, group=4) == 12  # as many as there are groups


def test_the_target_says_how_many_tokens_a_part_has_and_how_many_parts_there_are():
    c = ppo_config(batch={"size": 480, "epochs": 1, "prompt_length": 5})
    chips = target_of([SimpleNamespace(platform="tpu")])
    with building_for(chips):
        assert rows_at_a_time(c, ONE) == 480  # of 745, which hold 8192 tokens in rows of 11
    with building_for(replace(chips, part_tokens=110)):
        assert rows_at_a_time(c, ONE) == 120  # a quarter
    with building_for(replace(chips, part_tokens=110, most_parts=0)):
        assert rows_at_a_time(c, ONE) == 10
        assert rows_at_a_time(c, EIGHT) == 80
    assert rows_at_a_time(c, ONE) == 47


def test_the_longest_comparison_counts_its_prompt_once():
    lengths = [7, 9, 8, 10, 6]
    rows = RankedRows(Ragged.of([[0] * n for n in lengths]), np.array([0, 3, 5]), np.zeros(5), np.array([5, 0]))
    # the prompt's 4 first tokens, and its last with responses of 2, 4 and 3; 10 and 6 have no prompt
    assert rows.longest == 4 + 3 + 5 + 4
    assert RankedRows(rows.tokens, rows.groups, rows.ranks, np.array([1, 6])).longest == 7 + 9 + 8
