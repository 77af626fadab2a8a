"""What programs must send and compute, against MaxText's own compile of the same steps and against sums by hand."""

import pytest

from benchmarks.bounds import Pass, must_compute, must_send, passes, shard_bytes
from benchmarks.shapes import CASES

CASE = {case.name: case.described() for case in CASES}
GIB = 2**30


@pytest.mark.parametrize(("name", "flops"), [("sft/8b", 4.524e14), ("sft/8b/fsdp", 4.524e14), ("sft/70b", 1.057e15)])
def test_products_are_those_that_maxtext_compiles(name, flops):
    # remat_policy=full: everything but the last product of a layer twice; MaxText 0.2.5, libtpu 0.0.52
    assert must_compute(CASE[name]) == pytest.approx(flops, rel=5e-4)


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once():
    # 32 layers of 218,103,808 bfloat16 numbers, 63 of 64 parts of which come from elsewhere
    assert must_send(CASE["sft/8b/fsdp"])["inside"] == pytest.approx(3 * 32 * 218_103_808 * 2 * 63 / 64)


def test_tensor_gathers_and_scatters_what_blocks_read_and_give():
    # 80 layers x 11 (10 with `halves`) of 4 rows x 4,096 tokens x 8,192 x 2 bytes, 7 of 8 parts, beside the weights
    unit = 4 * 4096 * 8192 * 2 * 7 / 8
    weights = 3 * 80 * (3 * 8192 * 28672 + 2 * 8192 * 8192 + 2 * 8192 * 1024) * 2 / 8 * 63 / 64
    assert must_send(CASE["sft/70b"])["inside"] == pytest.approx(weights + 80 * 11 * unit)
    assert must_send(CASE["sft/70b/halves"])["inside"] == pytest.approx(weights + 80 * 10 * unit)


def test_an_update_passes_policy_value_and_text_in_each_epoch():
    # 512 rows of 2,048 tokens over 16 devices, in four parts; logits of responses alone, and of all of the text
    assert passes(CASE["ppo/8b/update"]) == 4 * [Pass(65536, 32768, 4), Pass(65536, 0, 4), Pass(65536, 65536)]
    assert passes(CASE["ppo/8b/score"]) == [Pass(65536, read, 4, trained=False) for read in (32768, 32768, 0, 0)]
    assert passes(CASE["ppo/8b/reshard"]) == []


def test_a_shard_is_its_part_of_all_matrices():
    assert shard_bytes(CASE["sft/70b/slices"]) == pytest.approx(2 * 70.55e9 / (16 * 8), rel=1e-3)


def test_nothing_is_said_of_experts_and_of_split_tokens():
    assert must_send(CASE["sft/30b_a3b"]) is None
    assert must_send(CASE["sft/8b/128k"]) is None
