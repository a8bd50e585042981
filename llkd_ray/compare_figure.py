"""The learning curves of a comparison: a panel a teacher, a line a policy, a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llkd_ray.drawing import plain
from llkd_ray.tables import ALL, GOLD, IN_WORDS, RANDOM, SCORES, TEACHER, Tables, size_in_words
from llkd_ray.words import count, percent

# Okabe & Ito's colours, without the yellow, which is too pale for a line on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RANDOM_COLOUR = "#7F7F7F"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Of what knows no budget: told apart by dashes, for they are all black.
LEVELS: dict[str, Any] = {GOLD: (0, (6, 2)), ALL: (0, (1.5, 1.5)), TEACHER: (0, (6, 2, 1, 2))}
PANEL_INCHES = (3.7, 2.9)
PANELS_A_ROW = 3
AXES = {"macro_f1": "macro-F1", "agreement": "agreement with the teacher"}
"""The measures that curves are drawn of, as their axes name them."""


def learning_curve(tables: Tables, measure: str = "macro_f1") -> Figure:
    """A measure against the texts trained on, a panel a teacher; bands are 95 % intervals over seeds."""
    n = len(tables.teachers)
    columns = min(n, PANELS_A_ROW)
    rows = -(-n // columns)
    width = max(columns * PANEL_INCHES[0], 5.2)
    figure = Figure(figsize=(width, rows * PANEL_INCHES[1] + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, teacher in zip(panels, tables.teachers, strict=False):
        _panel(axes, tables, teacher, measure)
    for axes in panels[n:]:
        axes.set_visible(False)
    for axes in panels[:n:columns]:
        axes.set_ylabel(AXES[measure])
    for axes in panels[max(0, n - columns) : n]:
        axes.set_xlabel("texts trained on")
    handles: dict[str, Any] = {}
    for axes in panels[:n]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=2 if columns == 1 else 4,
        frameon=False,
        fontsize=9,
        columnspacing=1.4,
        handlelength=2.6,
    )
    return figure


def _panel(axes: Axes, tables: Tables, teacher: str, measure: str) -> None:
    plain(axes)
    axes.set_title(teacher, loc="left", fontsize=10)
    for line in (GOLD, ALL):
        whole = tables.whole(teacher, line)
        if whole and measure in whole.figures:
            _level(axes, line, whole.figures[measure].mean)
    if measure in SCORES:
        _level(axes, TEACHER, getattr(tables.scores[teacher], measure))
    for (line, colour), marker in zip(_colours(tables.lines).items(), cycle(MARKERS), strict=False):
        there = (tables.cell(teacher, line, size) for size in tables.sizes)
        cells = [cell for cell in there if cell and measure in cell.figures]
        if not cells:
            continue
        x = [cell.figures["trained"].mean for cell in cells]
        means = [cell.figures[measure] for cell in cells]
        axes.plot(x, [m.mean for m in means], color=colour, marker=marker, markersize=4.5, label=line)
        low, high = ([m.mean + sign * (m.half or 0) for m in means] for sign in (-1, 1))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        else:  # A band needs two points.
            axes.errorbar(x, [m.mean for m in means], [m.half or 0 for m in means], color=colour, capsize=3)
    _fit(axes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlim(0, 1.05 * tables.sizes[-1])  # The same in all panels, and there before the first trial.


def _level(axes: Axes, line: str, height: float) -> None:
    """What knows no budget."""
    axes.axhline(height, color="black", linewidth=1.1, linestyle=LEVELS[line], label=IN_WORDS[line])


def _fit(axes: Axes) -> None:
    """Let the lines decide the height of a panel: with few seeds, bands can be wider than all of [0, 1]."""
    # Lines without a name of their own are the caps of error bars.
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    values = [float(y) for line in lines for y in np.atleast_1d(line.get_ydata())]
    if not values:  # An agreement that no trial of the teacher's tells.
        return
    room = max(0.02, 0.12 * (max(values) - min(values)))
    axes.set_ylim(min(values) - room, max(values) + room)


def _colours(lines: Sequence[str]) -> dict[str, str]:
    colours = cycle(COLOURS)
    return {line: RANDOM_COLOUR if line == RANDOM else next(colours) for line in lines}


def in_words(tables: Tables, measure: str = "macro_f1") -> str:
    """The figure in words, for who cannot see it."""
    size, teacher = tables.sizes[-1], tables.teachers[-1]
    cells = ((line, tables.cell(teacher, line, size)) for line in tables.lines)
    ends = ", ".join(
        f"{line} {percent(cell.figures[measure].mean)}"
        for line, cell in cells
        if cell and measure in cell.figures
    )
    where = size_in_words(size, tables.n_pool)
    name = AXES[measure][0].upper() + AXES[measure][1:]
    return f"{name} against texts trained on, a panel a teacher. {teacher}, at {where}: {ends}."
