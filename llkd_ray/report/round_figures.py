"""Figures of single rounds: selected texts, thresholds, and the timeline of teacher and student."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llkd_ray.display import count, decimals, duration, percent
from llkd_ray.evaluation.round_records import CandidateSample, RoundRecords
from llkd_ray.evaluation.run_record import PHASES, RunRecord, phase_seconds
from llkd_ray.metrics.uncertainty import Floats
from llkd_ray.report.figures import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    LEGEND,
    ORANGE,
    PHASE_COLOURS,
    PURPLE,
    SKY,
    VERMILION,
    Drawing,
    literal,
    new_figure,
    phase_legend,
    plain,
    share_limits,
    svg_element,
)

# Colour and marker each identify the class.
CLASS_STYLES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
CROWDED = 0.97
"""Above this median confidence, the axis is logarithmic in 1 - confidence."""
MOST_NINES = 6
"""The resolution of a float32 confidence near 1."""
LABELLED_BINS = 60
MARKED_ROUNDS = 12
"""The ends of at most this many rounds are marked."""
NARROW_NAME, WIDE_NAME = 13, 22
"""Characters of a class name for which a legend has room in three columns, and in two."""


def selected_figure(record: RunRecord, rounds: RoundRecords) -> Drawing | None:
    """The teacher's confidence against the student's uncertainty; one panel per round."""
    samples = rounds.samples
    if not samples:
        return None
    columns = min(2, len(samples))
    rows = -(-len(samples) // columns)
    figure = new_figure(4.8, 0.75 + 2.05 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    is_crowded, low = _set_scales(panels[0], samples)
    for axes, sample in zip(panels, samples, strict=False):
        _panel(axes, sample, len(record.labels), is_crowded, low)
    for axes in panels[len(samples) :]:
        axes.set_visible(False)
    for axes in panels[len(samples) - columns : len(samples)]:
        axes.tick_params(labelbottom=True)  # also above a hidden panel
    figure.supxlabel("teacher's confidence", fontsize=10)
    figure.supylabel("student's uncertainty", fontsize=10)
    names = record.labels if len(record.labels) <= len(CLASS_STYLES) else ["selected"]
    looks = [*_styles(len(record.labels)), (GREY, ".")]
    _legend(figure, [*names, "not selected"], looks, "none")
    said = "; ".join(_describe(sample) for sample in samples)
    words = f"The teacher's confidence against the student's uncertainty of a sample of texts. {said}."
    return Drawing(svg_element(figure, "scatter", words), _scatter_caption(record, samples, is_crowded))


def _scatter_caption(record: RunRecord, samples: Sequence[CandidateSample], is_crowded: bool) -> str:
    total = len(record.rounds)
    which = "each round" if len(samples) == total else f"{len(samples)} of the {total} rounds"
    said = [
        f"A sample of the texts that {which} could select, by the scores before the selection. Selected and "
        "other texts are sampled apart, so their numbers do not compare.",
        "To the right, the teacher is more confident; at the top, the student is less certain.",
    ]
    if is_crowded:
        said.append("The axis of the confidence is logarithmic towards 1.")
    if len(record.labels) <= len(CLASS_STYLES):
        said.append("Colours and markers: the teacher's labels of the selected texts.")
    else:
        said.append(f"With more than {len(CLASS_STYLES)} classes, all selected texts have one colour.")
    if any(np.isnan(sample.uncertainty_N).any() for sample in samples):
        said.append("“none”: the student had not scored them yet.")
    return " ".join(said)


def _set_scales(axes: Axes, samples: Sequence[CandidateSample]) -> tuple[bool, float]:
    """Set limits and ticks for all panels.

    Returns whether the confidence axis is logarithmic, and the lower limit of the uncertainty axis.
    """
    sure = np.concatenate([sample.confidence_N for sample in samples])
    if _is_crowded(sure):
        last = max(4, int(np.ceil(_nines(sure).max())))
        ticks = (0, 2, 4)  # more ticks would not fit under a panel
        axes.set_xticks(ticks, ["0", "0.99", "0.9999"])
        axes.set_xlim(0, last)
    else:
        axes.set_xlim(share_limits(sure)[0] if sure.size else 0.0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 2.5, 5, 10]))
    unsure = np.concatenate([sample.uncertainty_N for sample in samples])
    seen = unsure[~np.isnan(unsure)]
    low = share_limits(seen)[0] if seen.size else 0.0
    heights = {low: f"{low:.1f}", (low + 1) / 2: f"{(low + 1) / 2:.3g}", 1.0: "1"}
    if seen.size < unsure.size:
        heights[_unscored_height(low)] = "none"
        axes.set_ylim(_unscored_height(low) - 0.09 * (1 - low), 1)
    else:
        axes.set_ylim(low, 1)
    axes.set_yticks(list(heights), list(heights.values()))
    return _is_crowded(sure), low


def _is_crowded(confidence_N: Floats) -> bool:
    """Whether most values are too close to one for a linear axis."""
    return bool(confidence_N.size) and float(np.median(confidence_N)) > CROWDED


def _nines(confidence_N: Floats) -> Floats:
    """-log10(1 - confidence), the number of nines: 0.99 has two, 0.999 three."""
    return -np.log10(np.maximum(1.0 - confidence_N.astype(np.float64), 10.0**-MOST_NINES))


def _unscored_height(low: float) -> float:
    """The y position of texts that the student had not scored."""
    return low - 0.16 * (1 - low)


def _panel(axes: Axes, sample: CandidateSample, n_classes: int, is_crowded: bool, low: float) -> None:
    plain(axes)
    axes.set_title(f"round {sample.round_number}", loc="left", fontsize=9)
    unscored_N = np.isnan(sample.uncertainty_N)
    # Spread by the golden ratio, so that texts without an uncertainty do not overlap.
    spread_N = 0.12 * (1 - low) * ((np.arange(unscored_N.size) * 0.618) % 1 - 0.5)
    height_N = np.where(unscored_N, _unscored_height(low) + spread_N, sample.uncertainty_N)
    sure_N = _nines(sample.confidence_N) if is_crowded else sample.confidence_N
    others = ~sample.selected_N
    axes.plot(
        sure_N[others],
        height_N[others],
        linestyle="none",
        marker=".",
        markersize=3,
        color=GREY,
        alpha=0.45,
        markeredgewidth=0,
        clip_on=False,
    )
    for label, (colour, marker) in enumerate(_styles(n_classes)):
        these = sample.selected_N & ((sample.label_N == label) | (n_classes > len(CLASS_STYLES)))
        axes.plot(
            sure_N[these],
            height_N[these],
            linestyle="none",
            marker=marker,
            markersize=3.6,
            color=colour,
            alpha=0.8,
            markeredgewidth=0,
            clip_on=False,
        )


def _styles(n_classes: int) -> Sequence[tuple[str, str]]:
    """Colour and marker of each class; the same for all if there are too many classes."""
    return CLASS_STYLES[:n_classes] if n_classes <= len(CLASS_STYLES) else CLASS_STYLES[:1]


def _legend(
    figure: Figure, names: Sequence[str], looks: Sequence[tuple[str, str]], line: Literal["-", "none"]
) -> None:
    """Name colours and markers; ``line`` is the style of the lines between the markers."""
    handles = [
        Line2D([], [], linestyle=line, marker=marker, markersize=5, color=colour, label=_short(name))
        for name, (colour, marker) in zip(names, looks, strict=True)
    ]
    columns = 3 if max(map(len, names)) <= NARROW_NAME else 2
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, **LEGEND)


def _short(name: str) -> str:
    """Cut in the middle, because the names of similar classes often differ at their ends."""
    if len(name) > WIDE_NAME:
        name = f"{name[: WIDE_NAME // 2]}…{name[1 - WIDE_NAME // 2 :]}"
    return literal(name)


def _describe(sample: CandidateSample) -> str:
    parts = []
    for name, is_it_N in (
        ("selected", sample.selected_N),
        ("others", ~sample.selected_N),
    ):
        if not is_it_N.any():
            continue
        uncertainty_N = sample.uncertainty_N[is_it_N]
        scored_N = uncertainty_N[~np.isnan(uncertainty_N)]
        unsure = f"uncertainty {decimals(float(scored_N.mean()), 2)}" if scored_N.size else "not scored"
        sure = decimals(float(sample.confidence_N[is_it_N].mean()), 2)
        parts.append(f"{name}: mean confidence {sure}, {unsure}")
    return f"Round {sample.round_number}: {', '.join(parts)}"


def thresholds_figure(record: RunRecord, rounds: RoundRecords) -> Drawing | None:
    """Each class's threshold by round; one panel per signal."""
    if not rounds.thresholds:
        return None
    signals = [
        name
        for name in ("confidence", "uncertainty")
        if any(name in of_signal for _, of_signal in rounds.thresholds)
    ]
    figure = new_figure(4.8, 3.2)
    panels = figure.subplots(1, len(signals), squeeze=False).ravel()
    said = []
    for axes, name in zip(panels, signals, strict=True):
        plain(axes)
        axes.set_title(f"{name} at least", loc="left", fontsize=9)
        points = [(k, of_signal[name]) for k, of_signal in rounds.thresholds if name in of_signal]
        _threshold_lines(axes, points, len(record.labels))
        last = points[-1][1]
        said.append(f"{name} in round {points[-1][0]}: {decimals(min(last), 2)} to {decimals(max(last), 2)}")
    figure.supxlabel("round", fontsize=10)
    if len(record.labels) <= len(CLASS_STYLES):
        _legend(figure, record.labels, _styles(len(record.labels)), "-")
        caption = "The threshold of each class that a text had to reach to be selected."
    else:
        caption = (
            "The threshold that a text had to reach to be selected. With more than "
            f"{len(CLASS_STYLES)} classes, only their median (line) and range (band) are drawn."
        )
    words = f"Thresholds of the classes. {'; '.join(said)}."
    return Drawing(svg_element(figure, "thresholds", words), caption)


def _threshold_lines(axes: Axes, points: Sequence[tuple[int, list[float]]], n_classes: int) -> None:
    rounds = [k for k, _ in points]
    threshold_KC = np.array([of_class for _, of_class in points])
    if n_classes <= len(CLASS_STYLES):
        for label, (colour, marker) in enumerate(_styles(n_classes)):
            axes.plot(
                rounds,
                threshold_KC[:, label],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                clip_on=False,
            )
    else:
        median_K = np.median(threshold_KC, axis=1)
        axes.plot(rounds, median_K, color=BLUE, marker="o", markersize=4, clip_on=False)
        lowest_K, highest_K = threshold_KC.min(axis=1), threshold_KC.max(axis=1)
        axes.fill_between(rounds, lowest_K, highest_K, color=BLUE, alpha=0.2, linewidth=0)
    axes.set_xticks(rounds if len(rounds) <= 6 else rounds[:: -(-len(rounds) // 6)])
    axes.margins(x=0.12)
    axes.set_ylim(share_limits(threshold_KC.ravel()))


def timeline_figure(record: RunRecord) -> Drawing | None:
    """Labels per second above and the student's phases below, on one time axis."""
    if not record.rounds:
        return None
    start, done = 0.0, 0.0
    moments, spans = [(0.0, 0.0)], []
    for line in record.rounds:
        pace = line["pace"]
        moments += [(start + seconds, done) for seconds, _ in pace[:1]]
        # Within a round only: labels that a resumed driver finds at its start were made earlier.
        for (_, before), (seconds, labelled) in pairwise(pace):
            done += max(0.0, labelled - before)
            moments.append((start + seconds, done))
        at = start
        for phase, seconds in _in_order(phase_seconds(line)):
            spans.append((phase, at, seconds))
            at += seconds
        start = at
    if not start:
        return None
    scale, unit = (60.0, "minutes") if start >= 180 else (1.0, "seconds")
    figure = new_figure(4.8, 3.4)
    teacher, student = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _labels_a_second(plain(teacher), moments, start, scale)
    _phases(student, spans, scale)
    is_marked = 1 < len(record.rounds) <= MARKED_ROUNDS
    if is_marked:
        _mark_rounds((teacher, student), record.rounds, scale)
    student.set_xlabel(f"{unit} of work")
    student.set_xlim(0, start / scale)
    shown = [phase for phase in PHASES if any(name == phase and seconds for name, _, seconds in spans)]
    phase_legend(figure, shown)
    last = moments[-1][1]
    words = (
        f"Teacher and student side by side over {duration(start)}: {count(last)} texts were labelled, "
        f"the last after {duration(next(at for at, labelled in moments if labelled == last))}."
    )
    caption = "Teacher and student side by side."
    caption += " Grey lines: the ends of rounds." if is_marked else ""
    caption += " Time between two drivers of a run is left out; “teach” is the student waiting for labels"
    caption += ", “start” for the teacher's engine to start." if "start" in shown else "."
    return Drawing(svg_element(figure, "timeline", words), caption)


def _in_order(spent: dict[str, float]) -> list[tuple[str, float]]:
    """A round's phases in order; idle time mostly precedes training."""
    return [
        (name, spent[name]) for name in ("start", "teach", "refresh", "select", "idle", "train", "evaluate")
    ]


def _labels_a_second(axes: Axes, moments: Sequence[tuple[float, float]], end: float, scale: float) -> None:
    edges = np.linspace(0, end, LABELLED_BINS + 1)
    seconds, labelled = np.array(moments).T
    reached = np.interp(edges, seconds, labelled)
    rate = np.diff(reached) / np.diff(edges)
    axes.stairs(rate, edges / scale, fill=True, color=BLUE, alpha=0.85)
    axes.set_ylabel("labels\na second", fontsize=9)
    axes.set_title("teacher", loc="left", fontsize=9)


def _phases(axes: Axes, spans: Sequence[tuple[str, float, float]], scale: float) -> None:
    for phase in PHASES:
        bars = [(at / scale, seconds / scale) for name, at, seconds in spans if name == phase and seconds]
        axes.broken_barh(bars, (0, 1), color=PHASE_COLOURS[phase], linewidth=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    axes.set_title("student", loc="left", fontsize=9)


def _mark_rounds(panels: Sequence[Axes], rounds: Sequence[dict[str, Any]], scale: float) -> None:
    ends = np.cumsum([sum(phase_seconds(line).values()) for line in rounds])
    for axes in panels:
        for end in ends[:-1]:
            axes.axvline(end / scale, color=GRID, linewidth=0.9, zorder=0.5)


def describe_shares(rounds: RoundRecords) -> str:
    """The class whose share in the selection most exceeds its share of the labelled texts; '' if unknown."""
    known = [(one.trained / one.labelled, one) for one in rounds.balance if one.trained and one.labelled]
    if not known:
        return ""
    factor, most = max(known, key=lambda pair: pair[0])
    return (
        f"“{most.label}” is {percent(most.trained)} of what was trained on and {percent(most.labelled)} of "
        f"what was labelled, {factor:.1f} times as much."
    )
