import io
from dataclasses import replace

import pytest
from rich.console import Console

from rlhfjax.config.recipe import NAMES
from rlhfjax.evaluation.report.display import change, duration, number, one_line, percent, percent_interval, visible
from rlhfjax.evaluation.report.run_data import ReportData, read_run
from rlhfjax.evaluation.report.summary import summary_rows
from rlhfjax.evaluation.report.terminal import samples_table, summary_table
from rlhfjax.evaluation.results import Evaluation, Response, Sample
from rlhfjax.evaluation.statistics import Interval

from ..conftest import write_lines

HARD = "\u00a0"


def printed(table, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_summary_says_what_each_stage_did(run_dir):
    shown = printed(summary_table(read_run(run_dir)))
    for said in ("3 min 11 s", "60.4 % [58.6, 62.1]", "77.0 % [71.0, 81.0] (ridge judge)", "held out"):
        assert said in shown


def test_summary_is_of_what_is_handed_on(run_dir, evaluation):
    """SFT chose step 2 of 3, whose held-out loss is 4. The average that PPO hands on has a KL of its own."""
    rows = [
        {"step": step, "loss/train": 9.0 - step, "loss/validation": loss} for step, loss in ((1, 6), (2, 4), (3, 5))
    ]
    write_lines(run_dir / "sft" / "metrics.jsonl", rows)
    (run_dir / "sft" / "complete.json").write_text('{"step": 2}', "utf-8")
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "complete.json").write_text('{"vocab_size": 300}', "utf-8")
    figures = {row.stage: row.figure for row in summary_rows(read_run(run_dir))}
    assert figures["sft"] == "loss 8.00 → 6.00 nats per token, held out 4.00"
    assert figures["ppo"].endswith(" nats per response, in training; served: score 1.13, KL 3.6")
    assert _row(replace(read_run(run_dir), evaluation=None), "ppo").endswith("nats per response, in training")


def _row(run, stage):
    return next(row.figure for row in summary_rows(run) if row.stage == stage)


def test_summary_of_a_run_that_did_nothing():
    assert printed(summary_table(ReportData("empty"))).count("not run") == len(NAMES)


def test_samples_cannot_act_on_the_terminal(evaluation):
    """Markup stays as it was written, an escape sequence of a model is spelt out, no override gets through."""
    shown = printed(samples_table(evaluation))
    assert "[red]fine[/red]" in shown
    assert "\x1b[31m" not in shown
    assert "\\u{1b}[31mred" in shown
    assert "\u202e" not in shown
    assert "ridge judge 1.92, VADER 0.83" in shown
    assert "(empty)" in shown


def test_samples_with_other_policies_and_without_scores():
    samples = [Sample("p", {"sft": Response("one")}), Sample("q", {"dpo": Response("two")}), Sample("r", {})]
    shown = printed(samples_table(Evaluation(0, "", "", samples=samples), count=2))
    assert "dpo" in shown
    assert " r " not in shown


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain äß 語 🙂\n\ttext", "plain äß 語 🙂\n\ttext"),
        ("\x1b]0;title\x07", "\\u{1b}]0;title\\u{7}"),
        ("a\rb\x00\x9b", "a\\u{d}b\\u{0}\\u{9b}"),
        ("\ud800 \u202e\u2066", "\\u{d800} \\u{202e}\\u{2066}"),
    ],
)
def test_visible(text, seen):
    assert visible(text) == seen


def test_formats():
    assert one_line("a\n  b\tc", 4) == "a b…"
    assert percent(0.6423) == f"64.2{HARD}%"
    assert percent_interval(Interval(0.6423, 0.6, 0.7)) == f"64.2{HARD}%{HARD}[60.0,{HARD}70.0]"
    assert percent_interval(None) == percent(None) == number(float("nan")) == duration(None) == change(1.0, 0.0) == "–"
    assert number(-1.234) == "−1.23"
    assert (change(5.07, 4.96), change(1.0, 2.0)) == ("+2.2 %", "−50.0 %")
    seconds = (0.0, 9.94, 9.96, 59.4, 59.6, 3599.4, 3599.6, 7261)
    said = ["0.0 s", "9.9 s", "10 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "2 h 1 min"]
    assert [duration(s).replace(HARD, " ") for s in seconds] == said
