"""The figures of the report, one function each: numbers in, a matplotlib figure out, and `to_svg` for the page.

Figures are small SVG: text stays text, the background is transparent and ink takes the colour of the page, so they read
on a light screen, a dark one and on paper. No window system is needed and no matplotlib setting is left changed.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhfjax.evaluation.report.display import change, number, one_line
from rlhfjax.evaluation.results import AccuracyRow, Calibration, WinRow

Series = tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]

_INK = "#010203"  # replaced by currentColor; no other part of a figure uses it
_COLOURS = ("#3d85c8", "#d9822b", "#2e9e78", "#a463bf", "#c2504d", "#8a8f98")
_TIME = LinearSegmentedColormap.from_list("time", ["#d9a441", "#c2504d", "#7a5fc7"])
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhfjax",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _INK,
}
_MOST_POINTS = 300


@matplotlib.rc_context(_STYLE)
def loss_curves(series: Mapping[str, Series], unit: str) -> Figure:
    """Losses over steps; the held-out one is drawn with its points."""
    figure, axes = _panel(unit)
    for i, (label, (steps, values)) in enumerate(series.items()):
        _trace(axes, steps, values, _COLOURS[i % len(_COLOURS)], label)
    axes.legend(frameon=False)
    return figure


@matplotlib.rc_context(_STYLE)
def metric_curve(steps: Float[np.ndarray, "S"], values: Float[np.ndarray, "S"], unit: str, colour: int = 0) -> Figure:
    """One metric over the steps of online training."""
    figure, axes = _panel(unit)
    _trace(axes, steps, values, _COLOURS[colour % len(_COLOURS)])
    return figure


@matplotlib.rc_context(_STYLE)
def reward_against_kl(
    steps: Float[np.ndarray, "S"], kl: Float[np.ndarray, "S"], scores: Float[np.ndarray, "S"], score: str
) -> Figure:
    """What is called `score` against divergence from the reference, from amber (first step) to violet (last).

    Source: Gao et al. 2023, figure 1: what a policy pays in KL for its reward.
    """
    figure, axes = _panel(score, xlabel="KL from the reference, nats per response")
    order = np.linspace(0.0, 1.0, len(steps))
    axes.plot(kl, scores, color=_INK, alpha=0.15, linewidth=0.8)
    axes.scatter(kl, scores, c=_TIME(order), s=16, linewidths=0, zorder=3)
    axes.margins(y=0.14)
    for i, side, shift in ((0, "left", (6, -3)), (len(steps) - 1, "right", (2, 7))):
        axes.annotate(f"step {steps[i]:.0f}", (kl[i], scores[i]), shift, textcoords="offset points", ha=side)
    return figure


@matplotlib.rc_context(_STYLE)
def accuracy_bars(rows: Sequence[AccuracyRow], measures: Mapping[str, str]) -> Figure:
    """Share of pairs ordered right from chance (50 %) up: a group of bars per measure, a colour per row."""
    height = 0.8 / len(rows)
    figure, axes = _bars_panel(
        len(measures) * (len(rows) + 1) * 0.19 + 0.7, [one_line(title) for title in measures.values()]
    )
    for i, row in enumerate(rows):
        known = [(y, row.values[key]) for y, key in enumerate(measures) if row.values.get(key) is not None]
        places = np.array([y for y, _ in known]) + (i - (len(rows) - 1) / 2) * height
        _interval_bars(
            axes, places, [v for _, v in known if v], height * 0.85, _COLOURS[i % len(_COLOURS)], one_line(row.name)
        )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


@matplotlib.rc_context(_STYLE)
def reliability(measured: Calibration) -> Figure:
    """The share of people who agree against the probability that the model gives; larger points hold more pairs."""
    figure, axes = _panel("share that agrees", xlabel="probability that the model gives", size=(4.6, 3.2))
    axes.plot([0.5, 1.0], [0.5, 1.0], color=_INK, linewidth=1)
    sizes = 12.0 + 120.0 * np.array(measured.pairs) / max(measured.pairs)
    axes.plot(measured.predicted, measured.observed, color=_COLOURS[0], linewidth=1.2, alpha=0.6)
    axes.scatter(measured.predicted, measured.observed, s=sizes, color=_COLOURS[0], linewidths=0, zorder=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


@matplotlib.rc_context(_STYLE)
def win_rate_bars(rows: Sequence[WinRow]) -> Figure:
    """How often the policy beats the baseline, from an even match (50 %), with 95 % whiskers."""
    names = [f"{one_line(row.policy)} over {one_line(row.baseline)}\n{one_line(row.judge)}" for row in rows]
    figure, axes = _bars_panel(0.5 * len(rows) + 0.6, names)
    _interval_bars(axes, np.arange(len(rows)), [row.win for row in rows], 0.5, _COLOURS[0])
    axes.set_xlim(min(0.0, *axes.get_xlim()), 1.0)
    return figure


@matplotlib.rc_context(_STYLE)
def heldout_loss_bars(losses: Mapping[str, Mapping[str, float]]) -> Figure:
    """Loss on held-out text after each stage, with the change from the stage before it."""
    sets = list(dict.fromkeys(name for by_set in losses.values() for name in by_set))
    height = 0.8 / len(losses)
    figure, axes = _panel("", xlabel="nats per token", size=(4.6, len(sets) * (len(losses) + 1) * 0.22 + 0.7))
    before: dict[str, float] = {}
    for i, (stage, by_set) in enumerate(losses.items()):
        places = np.array([sets.index(name) for name in by_set]) + (i - (len(losses) - 1) / 2) * height
        bars = axes.barh(
            places, list(by_set.values()), height * 0.85, color=_COLOURS[i % len(_COLOURS)], label=one_line(stage)
        )
        said = [number(v) + (f" ({change(v, before[n])})" if n in before else "") for n, v in by_set.items()]
        axes.bar_label(bars, said, padding=3, fontsize=8)
        before.update(by_set)
    axes.set_yticks(range(len(sets)), [one_line(name) for name in sets])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.35 * axes.get_xlim()[1])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(losses), frameon=False)
    return figure


def to_svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an SVG element to stand inside a page: ids carry `name`, no reference leads out of it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, with its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    body = body.replace("xlink:href=", "href=").replace(_INK, "currentColor")
    prefix = re.sub(r"[^A-Za-z0-9]", "-", name)  # a stage may be called anything
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
    return Markup(f'<svg {box[0] if box else ""} role="img" aria-label="{escape(one_line(description))}">{body}')


def _panel(ylabel: str, xlabel: str = "step", size: tuple[float, float] = (4.6, 2.6)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def _bars_panel(height: float, names: list[str]) -> tuple[Figure, Axes]:
    figure, axes = _panel("", xlabel="", size=(4.6, height))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.axvline(0.5, color=_INK, linewidth=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, axes


def _interval_bars(axes: Axes, places: Any, intervals: list[Any], height: float, colour: str, label: str = "") -> None:
    """Bars from one half to the estimate, whiskers over the interval."""
    estimates = np.array([i.estimate for i in intervals])
    whiskers = np.abs(np.array([[i.low for i in intervals], [i.high for i in intervals]]) - estimates)
    axes.barh(places, estimates - 0.5, height, left=0.5, color=colour, label=label)
    axes.errorbar(estimates, places, xerr=whiskers, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)


def _trace(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str = "") -> None:
    """Few points as they are; many as bin means, over a pale band of what was averaged."""
    if len(steps) <= 12:
        axes.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        return
    if len(steps) > _MOST_POINTS:
        bins = np.array_split(np.arange(len(steps)), _MOST_POINTS)
        steps, values = (np.array([part[rows].mean() for rows in bins]) for part in (steps, values))
    window = max(len(steps) // 15, 1)
    smooth = [values[max(0, i - window) : i + window + 1].mean() for i in range(len(values))]
    axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
    axes.plot(steps, smooth, color=colour, linewidth=1.6, label=label)
