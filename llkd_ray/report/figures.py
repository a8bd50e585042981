"""Shared parts of all figures (axes, accessible colours, the <svg> element), and the figures of a whole run.

A figure takes the colours of text and grid from the page, so that it follows the light and dark schemes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llkd_ray.display import NARROW, count, duration, percent
from llkd_ray.evaluation.round_records import Baseline
from llkd_ray.evaluation.run_record import PHASES, RunRecord, phase_seconds

# The colours of Okabe & Ito, distinguishable with any common colour blindness.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
GREY = "#7F7F7F"
GRID = "#E4E4E4"
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9,
    "columnspacing": 1.2,
    "handlelength": 1.6,
    "handletextpad": 0.5,
}
_OF_THE_PAGE = {"#000000": "currentColor", GRID.lower(): "var(--line)", BLUE.lower(): "var(--blue)"}


class Drawing(NamedTuple):
    """A figure and its caption, which is written where it is drawn, to say what is drawn."""

    svg: Markup
    caption: str


def new_figure(width: float = 4.8, height: float = 3.2) -> Figure:
    """An empty figure; sizes in inches. Avoids pyplot, which has global state and may need a display."""
    return Figure(figsize=(width, height), layout="constrained")


def add_axes(figure: Figure, *place: int) -> Axes:
    """Axes with a light grid; ``place`` is matplotlib's (rows, columns, number)."""
    return plain(figure.add_subplot(*place))


def plain(axes: Axes) -> Axes:
    """The same axes, without a frame and with a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def share_limits(shares: Iterable[float]) -> tuple[float, float]:
    """Limits of an axis for these shares: whole tenths around them, inside [0, 1].

    At least a tenth apart, so that the axis does not enlarge small differences.
    """
    known = list(shares)
    high = min(1.0, max(0.1, math.ceil(10 * max(known)) / 10))
    return max(0.0, min(math.floor(10 * min(known)) / 10, high - 0.1)), high


def literal(name: str) -> str:
    """A name as matplotlib shows it: not parsed as maths, nor left out for its leading underscore."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def svg_element(figure: Figure, prefix: str, description: str) -> Markup:
    """The figure as an <svg> element that fills the available width."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Element ids must be unique across the figures of a page, and stable between renderings.
    ids = {old: f"{prefix}-{n}" for n, old in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(r'(\bid="|#)([^"\s;)]+)(?=["\)])', lambda m: m[1] + ids.get(m[2], m[2]), svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\n\s*", "\n", svg)
    for fixed, of_the_page in _OF_THE_PAGE.items():
        svg = svg.replace(fixed, of_the_page)
    # matplotlib writes no fill for black text, so currentColor sets the colour of letters.
    opening = Markup(' role="img" fill="currentColor" aria-label="{}"').format(description)
    return Markup(svg.replace("<svg", f"<svg{opening}", 1))


ACCURACY_COLOUR, F1_COLOUR, AGREEMENT_COLOUR = BLUE, VERMILION, GREEN
PHASE_COLOURS = dict(zip(PHASES, (ORANGE, BLUE, PURPLE, VERMILION, SKY, GREEN, "#BBBBBB"), strict=True))


def _curve(
    axes: Axes,
    rounds: Sequence[dict[str, Any]],
    key: str,
    name: str,
    colour: str,
    is_baseline: bool = False,
) -> str:
    """Draw one measure against the texts trained on; returns its description, '' if it is unknown."""
    points = [
        (line["trained"], line[key])
        for line in rounds
        if line.get("trained") is not None and line.get(key) is not None
    ]
    if not points:
        return ""
    look: dict[str, Any] = {"marker": "o", "markersize": 4.5}
    if is_baseline:
        look = {"marker": ".", "markersize": 4, "linestyle": ":", "linewidth": 1.4}
    axes.plot(*zip(*points, strict=True), color=colour, label=name, clip_on=False, **look)
    (first_x, first), (last_x, last) = points[0], points[-1]
    start = f"from {percent(first)} after {count(first_x)} texts to " if len(points) > 1 else ""
    return f"{name}: {start}{percent(last)} after {count(last_x)} texts."


def _finish_curve(
    figure: Figure,
    record: RunRecord,
    baseline: Baseline | None,
    prefix: str,
    said: Sequence[str],
    caption: str,
) -> Drawing:
    (axes,) = figure.axes
    axes.set_xlabel("texts trained on")
    axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 4):g}{NARROW}%")
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    tick_at(axes, record, "trained", at_most=6)
    axes.margins(x=0.06)
    axes.set_ylim(share_limits(float(y) for line in axes.lines for y in np.asarray(line.get_ydata())))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside upper left", ncols=2, **LEGEND)
    drawn = {line.get_linestyle() for line in axes.lines}
    if "--" in drawn:
        caption += " Dashed: the teacher on the same texts."
    if baseline and ":" in drawn:
        caption += f" Dotted: the run {baseline.name} as a baseline."
    return Drawing(svg_element(figure, prefix, " ".join(part for part in said if part)), caption)


def tick_at(axes: Axes, record: RunRecord, key: str, at_most: int) -> None:
    """Ticks at the rounds, or at round numbers if there are too many rounds."""
    places = [line[key] for line in record.rounds if line.get(key) is not None]
    if len(places) <= at_most:
        axes.set_xticks(places)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=at_most, integer=True))


def learning_curve(record: RunRecord, baseline: Baseline | None = None) -> Drawing | None:
    """Accuracy and macro-F1 on gold; the teacher's dashed, the baseline's dotted."""
    figure = new_figure()
    axes = add_axes(figure)
    said = []
    for key, name, colour in (
        ("accuracy", "Student's accuracy", ACCURACY_COLOUR),
        ("macro_f1", "Student's macro-F1", F1_COLOUR),
    ):
        said.append(_curve(axes, record.rounds, key, name, colour))
        if said[-1] and (level := record.teacher[key]) is not None:
            teachers = name.replace("Student", "Teacher")
            axes.axhline(level, color=colour, linestyle="--", linewidth=1.2, label=teachers, clip_on=False)
            said.append(f"{teachers}: {percent(level)}.")
        if said[-1] and baseline:
            baselines = name.replace("Student's", "Baseline's")
            said.append(_curve(axes, baseline.rounds, key, baselines, colour, is_baseline=True))
    caption = "On the test texts, against their true labels."
    return _finish_curve(figure, record, baseline, "curve", said, caption) if any(said) else None


def agreement_curve(record: RunRecord, held_out: str, baseline: Baseline | None = None) -> Drawing | None:
    """Agreement with the teacher on the hold-out, which ``held_out`` names."""
    figure = new_figure()
    axes = add_axes(figure)
    said = [_curve(axes, record.rounds, "teacher_agreement", "Same answer as the teacher", AGREEMENT_COLOUR)]
    if said[0] and baseline:
        name = "The same, baseline"
        rounds = baseline.rounds
        said.append(_curve(axes, rounds, "teacher_agreement", name, AGREEMENT_COLOUR, is_baseline=True))
    caption = (
        f"On {held_out} that the student never trains on. The teacher may be wrong, so this is not accuracy."
    )
    return _finish_curve(figure, record, baseline, "agreement", said, caption) if said[0] else None


def time_bars(record: RunRecord) -> Drawing | None:
    """Seconds of each phase, by round."""
    spent = [phase_seconds(line) for line in record.rounds]
    totals = {phase: total for phase in PHASES if (total := sum(one[phase] for one in spent))}
    if not totals:
        return None
    figure = new_figure()
    axes = add_axes(figure)
    rounds = [line["round"] for line in record.rounds]
    below = np.zeros(len(rounds))
    for phase in totals:
        height = np.array([one[phase] for one in spent])
        axes.bar(rounds, height, 0.7, bottom=below, color=PHASE_COLOURS[phase])
        below += height
    axes.set_xlabel("round")
    axes.set_ylabel("seconds")
    tick_at(axes, record, "round", at_most=12)
    axes.set_xlim(rounds[0] - 0.9, rounds[-1] + 0.9)  # room for one bar, but no tick beyond the rounds
    phase_legend(figure, list(totals))
    words = ", ".join(f"{phase} {duration(total)}" for phase, total in totals.items())
    caption = (
        "Seconds of each round. The teacher labels throughout: “teach” is the time that a round waited for "
        "labels."
    )
    if "start" in totals:
        caption += " “start”: the part of the first round's wait in which the teacher's engine started."
    return Drawing(svg_element(figure, "time", f"Time of each phase, over all rounds: {words}."), caption)


def phase_legend(figure: Figure, phases: Sequence[str]) -> None:
    handles = [
        Line2D([], [], linestyle="none", marker="s", markersize=7, color=PHASE_COLOURS[phase], label=phase)
        for phase in phases
    ]
    columns = 6 if len(phases) <= 6 else 4
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, **LEGEND)


def reliability_diagram(record: RunRecord) -> Drawing | None:
    """Reliability of the teacher's probabilities, both raw and calibrated."""
    quality = record.teacher["quality"]
    if not quality:
        return None
    used = "as used" if is_changed(record) else "as given"
    series = [(used, quality["used"]["reliability"], ACCURACY_COLOUR, "o")]
    if is_changed(record):
        series.insert(0, ("as given", quality["raw"]["reliability"], F1_COLOUR, "s"))
    return _reliability(series, "reliability", "Below the dashed line the teacher is over-confident.")


def student_reliability(bins: Sequence[dict[str, Any]]) -> Drawing | None:
    """Reliability of the student's answers on the test set after the last round."""
    if not bins:
        return None
    caption = "The student on the test set. Below the dashed line it is over-confident."
    return _reliability([("student", bins, ACCURACY_COLOUR, "o")], "student-reliability", caption)


def _reliability(
    series: Sequence[tuple[str, Sequence[dict[str, Any]], str, str]], prefix: str, caption: str
) -> Drawing:
    """Accuracy against confidence in bins (Guo et al. 2017, fig. 1); a point's area shows its texts."""
    figure = new_figure(4.8, 4.2)
    axes = add_axes(figure)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1.2, linestyle="--", label="calibrated")
    said = []
    for name, bins, colour, marker in series:
        filled = [one for one in bins if one["texts"]]
        confidence_M, accuracy_M, texts_M = (
            np.array([one[k] for one in filled]) for k in ("confidence", "accuracy", "texts")
        )
        axes.plot(confidence_M, accuracy_M, color=colour, linewidth=1, alpha=0.6, clip_on=False)
        area_M = 12 + 260 * texts_M / texts_M.sum()
        axes.scatter(
            confidence_M,
            accuracy_M,
            area_M,
            color=colour,
            marker=marker,
            alpha=0.75,
            linewidths=0,
            label=name,
            clip_on=False,
        )
        mean_confidence, accuracy = (
            float((texts_M * x).sum() / texts_M.sum()) for x in (confidence_M, accuracy_M)
        )
        said.append(f"{name}: confidence {percent(mean_confidence)}, accuracy {percent(accuracy)}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{round(100 * value):d}{NARROW}%")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    legend = figure.legend(loc="outside upper left", ncols=3, **LEGEND)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([36])
    words = f"Accuracy against confidence in {len(series[0][1])} bins. On average, {'; '.join(said)}."
    return Drawing(svg_element(figure, prefix, words), f"{caption} The larger a point, the more texts.")


def is_changed(record: RunRecord) -> bool:
    """Whether a calibrator changes the teacher's probabilities."""
    return record.teacher["quality"]["method"] not in ("raw", "votes")
