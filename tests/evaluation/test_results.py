import json

import numpy as np
import pytest

from rlhfjax.errors import DataError
from rlhfjax.evaluation.results import Evaluation, PolicyRow, WinRow
from rlhfjax.evaluation.statistics import Interval


def test_what_is_written_is_read_back(evaluation):
    again = Evaluation.from_json(evaluation.to_json())
    assert again == evaluation
    assert isinstance(again.win_rates[0].win, Interval)
    assert again.win_rates[0].win.low == 0.71


def test_an_interval_is_a_plain_list_and_order_is_kept(evaluation):
    plain = json.loads(evaluation.to_json())
    assert plain["win_rates"][0]["win"] == [0.77, 0.71, 0.81]
    assert list(plain["heldout_losses"]) == ["pretrain", "sft", "ppo"]


def test_numbers_that_are_not_finite_stay_plain_json():
    text = Evaluation(0, "", "", heldout_losses={"ppo": {"chat": float("nan"), "more": float("inf")}}).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["heldout_losses"]["ppo"]["chat"] == "NaN"
    again = Evaluation.from_json(text).heldout_losses["ppo"]
    assert np.isnan(again["chat"])
    assert again["more"] == float("inf")


def test_numbers_of_arrays_are_taken():
    row = WinRow("judge", "a", "b", Interval(0.5, 0.4, 0.6), np.float32(0.25), np.float64(1.0))
    policy = PolicyRow("sft", np.int64(3), np.float32(2.5), 0.5, 0.5, np.float64(1.0))
    text = Evaluation(0, "", "", win_rates=[row], policies=[policy]).to_json()
    assert json.loads(text)["win_rates"][0]["policy_mean"] == 0.25


def test_a_run_without_ratings_is_an_evaluation_too():
    assert Evaluation.from_json('{"seed": 1, "date": "d", "hardware": "h"}').reward_accuracy == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "file.json: the whole file"),
        ('{"seed": 1, "date": "d"}', "file.json: hardware"),
        ('{"seed": 1, "date": "d", "hardware": "h", "stage_seconds": {"sft": "long"}}', "file.json: stage_seconds.sft"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(text, said):
    with pytest.raises(DataError, match=said):
        Evaluation.from_json(text, "file.json")
