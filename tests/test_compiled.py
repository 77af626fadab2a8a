"""Programs compiled by libtpu for chips that are not here: what they send, hold and compute (docs/pods.md).

The result file is asked, which `make compiled` makes anew. All layers of each model are compiled: they are one loop, so
that a deep model takes no longer. What is compared with is reckoned from shapes (`benchmarks/bounds.py`), or what
MaxText 0.2.5's own ahead-of-time compile of the same step gives.
"""

import json

import pytest

from benchmarks.bounds import must_compute, must_send, shard_bytes
from benchmarks.figures import OURS
from benchmarks.pods_table import FILE
from benchmarks.shapes import CASES, layers_of

GIB = 2**30
ROWS = json.loads(FILE.read_text(encoding="utf-8"))
BY_NAME = {case.name: case for case in CASES}
SFT = ("sft/8b", "sft/8b/halves", "sft/8b/fsdp", "sft/70b", "sft/70b/halves")
SCATTERED = [name for name in SFT if name != "sft/8b/fsdp"]  # which sums gradients on all of its devices: see below
ROLLOUTS = ("ppo/8b/rollout", "ppo/8b/rollout/int8", "ppo/70b/rollout", "ppo/30b_a3b/rollout")


def found(name, system=OURS):
    """What `benchmarks.compile_one` said of a case."""
    return {row["metric"]: row["value"] for row in ROWS if (row["workload"], row["system"]) == (name, system)}


def must(name):
    return {place: size / GIB for place, size in must_send(BY_NAME[name].described()).items()}


def needed(name):
    return must_compute(BY_NAME[name].described())


@pytest.mark.parametrize("name", [*SCATTERED, "ppo/8b/score", "ppo/8b/update", "ppo/70b/update"])
def test_what_is_sent_is_what_must_be(name):
    made, least = found(name), must(name)
    assert made["inside_ring_gib"] <= 1.02 * least["inside"]
    assert made["outside_ring_gib"] <= 1.05 * least["outside"]


@pytest.mark.parametrize("name", SFT)
def test_products_are_those_of_the_equations_and_of_remat(name):
    assert found(name)["product_flops"] == pytest.approx(needed(name), rel=2e-3)


@pytest.mark.parametrize("name", SFT)
def test_little_moves_outside_of_layers(name):
    assert found(name)["outside_result_gib"] <= 2.5


@pytest.mark.parametrize(
    ("name", "temporaries", "sent"),
    [("sft/8b", 7.02, 89.4), ("sft/8b/halves", 7.0, 70), ("sft/8b/fsdp", 7.18, 51.2), ("sft/70b", 5.33, 360.2)],
)
def test_no_more_memory_and_bytes_than_maxtext(name, temporaries, sent):
    """MaxText's own compile of the same step holds and sends as much; with `halves` 8B sends less than 70."""
    assert found(name)["temporaries_gib"] < temporaries
    assert found(name)["inside_ring_gib"] <= sent


def test_without_a_sum_for_each_output_70b_sends_less_than_228():
    assert found("sft/70b/halves")["inside_ring_gib"] <= 228


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_rollout_fits_and_computes_what_it_needs(name):
    assert found(name)["temporaries_gib"] <= 10
    # Experts have room for a quarter more tokens than the even share, on whatever device.
    assert found(name)["product_flops"] <= (1.3 if "30b" in name else 1.05) * needed(name)


@pytest.mark.parametrize("name", ["ppo/8b/rollout", "ppo/8b/rollout/int8", "ppo/70b/rollout"])
def test_a_token_sends_sums_and_no_weight(name):
    case = BY_NAME[name].described()
    turns = layers_of(case) * case["length"]
    of_layers = [row for row in found(name)["most_gib"] if row[1] in (turns, turns - 1)]
    assert {row[2] for row in of_layers} == {"all_reduce"}
    assert sum(row[4] for row in of_layers) * 1024 <= 1  # MiB a token and layer


def test_integers_halve_what_a_rollout_reads():
    assert found("ppo/8b/rollout/int8")["arguments_gib"] <= 0.52 * found("ppo/8b/rollout")["arguments_gib"]


@pytest.mark.parametrize(("name", "gib"), [("sft/30b_a3b", 95), ("sft/8b/v5e", 15.75), ("sft/8b/v6e", 31.25)])
def test_programs_fit_their_chips(name, gib):
    assert found(name)["peak_gib"] <= gib


def test_experts_compute_for_their_own_tokens():
    assert found("sft/30b_a3b")["product_flops"] <= 1.3 * needed("sft/30b_a3b")


def test_slices_exchange_one_shard_of_the_gradient():
    """Gradients are reduced within a slice first; of the update, each slice makes half and gathers the other."""
    sent, shard = found("sft/70b/slices")["between_gib"], shard_bytes(BY_NAME["sft/70b/slices"].described()) / GIB
    assert sent["all_reduce"] == pytest.approx(shard, rel=0.05)
    assert sent["all_gather"] == pytest.approx(shard, rel=0.05)  # half of the parameters, which are float32
