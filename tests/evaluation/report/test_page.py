"""The page: complete, self-contained, and deaf to whatever a model wrote."""

import re
import stat
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from rlhfjax.evaluation.report import plots
from rlhfjax.evaluation.report.page import flatten, render_report, write_report
from rlhfjax.evaluation.report.run_data import ReportData, read_run
from rlhfjax.evaluation.results import AccuracyRow, Evaluation, Response, Sample
from rlhfjax.evaluation.statistics import Interval

from ..conftest import HOSTILE, write_lines

TITLES = [
    "Summary",
    "Losses",
    "Online training: ppo",
    "Reward against KL: ppo",
    "Reward model",
    "Win rates",
    "Length and diversity",
    "Held-out loss",
    "Before and after",
    "Configuration and provenance",
]


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    def named(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def section(html: str, title: str) -> str:
    return html.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_a_whole_run_has_every_section(run_dir):
    html = render_report(read_run(run_dir))
    assert headings(html) == TITLES
    assert "not run" not in html
    assert html.count("<svg") == 3 + 6 + 1 + 1 + 1 + 1
    assert "2026-11-03 14:02 · cpu, 2 devices · seed 0" in html
    text = Page(html).text.replace("\u00a0", " ")
    for said in ("64.4 % [62.6, 66.1]", "77.0 % [71.0, 81.0]", "4.96 (−2.6 %)", "jax", "0.10.2", "iterations: 45"):
        assert said in text


def test_the_page_loads_nothing_and_runs_nothing(run_dir):
    html = render_report(read_run(run_dir))
    assert not re.search(r"https?://|xlink|@import|<!DOCTYPE svg", html)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert all(href.startswith("#") for href in page.named("href"))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.named("content")


def test_figure_references_resolve_and_ids_are_unique(run_dir):
    html = render_report(read_run(run_dir))
    ids = Page(html).named("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#(.*?)\)", html) + re.findall(r'href="#(.*?)"', html)) <= set(ids)


def test_text_of_models_is_only_ever_text(run_dir):
    html = render_report(read_run(run_dir))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html
    text = Page(html).text
    assert "[red]fine[/red] \\u{1b}[31mred" in text
    assert "<b>bold</b>" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", html)


def test_names_configuration_and_attempts_are_text_too(tmp_path):
    evil = "<img src=x onerror=alert(1)>'\"$x_$ 語\ud800"
    row = AccuracyRow(evil, {evil: Interval(0.6, 0.5, 0.7)})
    evaluation = Evaluation(
        0,
        evil,
        evil,
        stage_seconds={evil: 1.0},
        heldout_losses={evil: {evil: 1.0}},
        reward_accuracy=[row],
        samples=[Sample(evil, {evil: Response(evil, {evil: 1.0})})],
    )
    metrics = {evil: [{"step": 0, "loss/train": 1.0, "objective/kl": 0.0, "objective/scores": 1.0}]}
    run = ReportData(evil, evil, [{evil: evil, "nested": {evil: [evil]}}], metrics, evaluation)
    target = write_report(tmp_path / "report.html", run)
    page = Page(target.read_text("utf-8"))
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name == "onerror"]


def test_an_empty_run_says_so_everywhere():
    html = render_report(ReportData("empty"))
    assert headings(html) == TITLES
    for title in TITLES:
        assert "not run" in section(html, title), title
    assert "<svg" not in html


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_run_without_one_stage_still_has_the_others(run_dir, stage):
    (run_dir / stage / "metrics.jsonl").unlink()
    html = render_report(read_run(run_dir))
    assert html.count("<svg") == (6 if stage == "ppo" else 12)
    assert ("not run" in section(html, "Online training: ppo")) == (stage == "ppo")


def test_a_run_before_its_evaluation(run_dir):
    (run_dir / "evaluate" / "evaluation.json").unlink()
    html = render_report(read_run(run_dir))
    assert "<svg" in section(html, "Losses")
    for title in TITLES[4:9]:
        assert "not run" in section(html, title)


def test_odd_metrics_do_not_break_the_page(tmp_path, evaluation):
    """One step, NaN, a metric that some steps lack, more steps than a figure shows, an interval without ends."""
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 5, "loss/train": float("nan")}])
    write_lines(tmp_path / "pretrain" / "metrics.jsonl", [{"step": i, "loss/train": 1 / (i + 1)} for i in range(2000)])
    rows = [{"step": 0, "objective/kl": 0.0}, {"step": 1, "objective/kl": 1.0, "objective/scores": 2.0}]
    rows.append({"step": 2, "objective/scores": 3.0})
    write_lines(tmp_path / "ppo" / "metrics.jsonl", rows)
    odd = replace(
        evaluation,
        reward_accuracy=[AccuracyRow("x", {"within_mean": None, "own measure": Interval(0.5, np.nan, np.nan)})],
        heldout_losses={"sft": {"chat": float("nan")}, "ppo": {"other": 2.0}, "none": {}},
    )
    html = render_report(replace(read_run(tmp_path), evaluation=odd))
    assert html.count("<svg") == 2 + 2 + 1 + 1 + 1 + 1
    assert "own measure" in html
    assert len(html) < 400_000


def test_the_file_is_whole_private_and_replaced(run_dir):
    target = run_dir / "report.html"
    target.write_text("old")
    assert write_report(target, read_run(run_dir)) == target
    assert target.read_text("utf-8").startswith("<!doctype html>")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert not list(run_dir.glob(".report*"))


def test_drawing_leaves_matplotlib_as_it_was(run_dir):
    before = dict(matplotlib.rcParams)
    render_report(read_run(run_dir))
    assert dict(matplotlib.rcParams) == before


def test_ink_follows_the_page():
    svg = plots.to_svg(plots.metric_curve(np.arange(3.0), np.arange(3.0), "$unit$ <b>"), "one", 'a "title" <b>')
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert 'aria-label="a &#34;title&#34; &lt;b&gt;"' in svg
    assert "$unit$ &lt;b&gt;" in svg
    assert svg.startswith("<svg viewBox=")


def test_bars_show_the_numbers_they_are_given():
    row = AccuracyRow("model", {"a": Interval(0.7, 0.6, 0.75), "b": None})
    axes = plots.accuracy_bars([row], {"a": "A", "b": "B"}).axes[0]
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_width()) == (0.5, pytest.approx(0.2))
    (whisker,) = axes.collections
    assert whisker.get_segments()[0][:, 0] == pytest.approx([0.6, 0.75])
    losses = plots.heldout_loss_bars({"sft": {"chat": 4.0}, "ppo": {"chat": 5.0}}).axes[0]
    assert [bar.get_width() for bar in losses.patches] == [4.0, 5.0]
    assert [text.get_text() for text in losses.texts] == ["4.00", "5.00 (+25.0 %)"]


def test_curves_show_the_numbers_they_are_given():
    kl, scores = np.array([0.0, 1.0, 3.0]), np.array([0.5, 1.5, 1.0])
    axes = plots.reward_against_kl(np.array([10.0, 20.0, 30.0]), kl, scores, "score").axes[0]
    assert np.asarray(axes.collections[0].get_offsets()).tolist() == [[0.0, 0.5], [1.0, 1.5], [3.0, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["step 10", "step 30"]
    constant = plots.metric_curve(np.arange(1000.0), np.full(1000, 2.0), "u").axes[0]
    for line in constant.lines:
        assert np.asarray(line.get_ydata()) == pytest.approx(2.0)
        assert 0 <= line.get_xdata()[0] < 5
        assert 995 < line.get_xdata()[-1] <= 999


def test_flatten():
    record = {"seed": 0, "config": {"a": 1}, "versions": {"jax": "1", "config": {"b": 2}}, "argv": ["run", "x"]}
    assert flatten(record) == [("seed", "0"), ("versions.jax", "1"), ("versions.config.b", "2"), ("argv", "run x")]


def test_hostile_sample_reaches_the_page(run_dir):
    assert HOSTILE.startswith("[red]")
    assert any(r.text == HOSTILE for s in read_run(run_dir).evaluation.samples for r in s.responses.values())
