import json

import numpy as np
import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.evaluation.report.run_data import read_run

from ..conftest import CONFIG, write_lines


def test_reads_all_that_a_run_left(run_dir, evaluation):
    run = read_run(run_dir)
    assert (run.name, run.config, run.evaluation) == ("movies-rlhf", CONFIG, evaluation)
    assert [attempt["attempt"] for attempt in run.attempts] == [1, 2]
    assert run.online_stages == ["ppo"]
    assert run.series("ppo", "objective/kl")[0].tolist() == list(range(45))


def test_an_empty_directory_is_a_run_that_did_nothing(tmp_path):
    run = read_run(tmp_path)
    assert (run.config, run.attempts, run.metrics, run.evaluation, run.online_stages) == ("", [], {}, None, [])
    assert run.series("ppo", "objective/kl")[0].size == 0


def test_after_a_resume_the_later_line_holds(tmp_path):
    """Steps 2 and 3 were logged, the checkpoint was that of step 1: they come again. Validation has its own line."""
    rows = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5)]
    lines = [{"step": step, "loss/train": loss} for step, loss in rows]
    write_lines(tmp_path / "sft" / "metrics.jsonl", [*lines, {"step": 2, "loss/validation": 9.0}])
    run = read_run(tmp_path)
    steps, losses = run.series("sft", "loss/train")
    assert (steps.tolist(), losses.tolist()) == ([1, 2, 3], [5.0, 4.5, 3.5])
    assert run.series("sft", "absent", "loss/validation")[1].tolist() == [9.0]


def test_a_stage_of_another_name_is_shown_after_the_recipe(tmp_path):
    write_lines(
        tmp_path / "best_of_n" / "metrics.jsonl", [{"step": 1, "objective/kl": 0.5, "note": "text", "none": None}]
    )
    run = read_run(tmp_path)
    assert run.stages[-1] == "best_of_n"
    assert run.online_stages == ["best_of_n"]
    assert run.series("best_of_n", "note")[0].size == run.series("best_of_n", "none")[0].size == 0


def test_a_line_cut_short_by_a_kill_is_left_out_but_only_the_last(tmp_path):
    path = tmp_path / "sft" / "metrics.jsonl"
    write_lines(path, [{"step": 1, "loss/train": 2.0, "text": "a\u2028b"}])
    whole = json.dumps({"step": 1, "loss/train": 2.0, "text": "a\u2028b"}, ensure_ascii=False)
    path.write_text(whole + '\n{"step": 2, "loss/tr', "utf-8")
    assert read_run(tmp_path).series("sft", "loss/train")[0].tolist() == [1]
    path.write_text('{"step": 2, "loss/tr\n' + whole, "utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_run(tmp_path)


def test_words_for_numbers_that_are_not_finite_are_read(tmp_path):
    # fails where a row is left out for its word: the curve would go on as if nothing had been
    (tmp_path / "ppo").mkdir()
    write_lines(tmp_path / "ppo" / "metrics.jsonl", [{"step": 1, "loss/total": "NaN"}, {"step": 2, "loss/total": 0.5}])
    steps, values = read_run(tmp_path).series("ppo", "loss/total")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(values, [np.nan, 0.5])


def test_no_such_run(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        read_run(tmp_path / "absent")
