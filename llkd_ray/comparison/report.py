"""Writes the files of a comparison: tables as CSV and Markdown, learning curves, and one offline page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llkd_ray.comparison.tables import (
    ALL,
    BASELINES,
    CELL,
    GOLD,
    MEASURES,
    OVER_TEACHERS,
    RANDOM,
    SCORES,
    TEACHER,
    TITLES,
    Group,
    Mean,
    Row,
    Tables,
    best_line,
    class_table,
    cost_table,
    describe_size,
    difference_table,
    f1_column,
    points,
    result_columns,
    score_table,
)
from llkd_ray.config.base import ConfigError
from llkd_ray.display import count, escape_formula, markdown, percent, unescape_formula
from llkd_ray.report.figures import literal, plain, svg_element
from llkd_ray.report.pages import page_environment
from llkd_ray.storage.run_dir import RunStore

RESULTS, SUMMARY, PER_CLASS = "results.csv", "summary.csv", "per_class.csv"
MARKDOWN, PAGE = "report.md", "report.html"
CURVES = {"macro_f1": "learning_curve", "agreement": "agreement_curve"}
"""By measure: the files of its curves, as png and svg."""
TEXT_COLUMNS = ("teacher", "line")


def write_comparison(
    store: RunStore, tables: Tables, results: Sequence[Row], *, settings: str, missing: int, trials: int
) -> None:
    """Write all files of a comparison's report; ``missing`` of its ``trials`` are unfinished."""
    store.write_bytes(RESULTS, _csv(pd.DataFrame(results, columns=result_columns(tables.names))))
    store.write_bytes(SUMMARY, _csv(summary_frame(tables)))
    store.write_bytes(PER_CLASS, _csv(class_frame(tables)))
    for measure, file in CURVES.items():
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            learning_curve(tables, measure).savefig(buffer, format=kind, dpi=150, metadata=metadata)
            store.write_bytes(f"{file}.{kind}", buffer.getvalue())
    facts: dict[str, Any] = {
        "tables": tables,
        "conclusion": conclusion(tables),
        "note": f"{missing} of {trials} trials are missing: the figures are of those that are finished."
        if missing
        else "",
        "scores": [
            (title, score_table(tables, name), difference_table(tables, name))
            for title, name in (("Macro-F1", "macro_f1"), ("Accuracy", "accuracy"))
        ],
        "agreement": score_table(tables, "agreement"),
        "costs": cost_table(tables),
        "classes": [(teacher, *class_table(tables, teacher)) for teacher in tables.teachers],
        "largest": describe_size(tables.sizes[-1], tables.n_pool),
        "seeds": f"{tables.n_seeds} seed{'s' if tables.n_seeds != 1 else ''}",
    }
    store.write_bytes(MARKDOWN, _in_markdown(facts).encode())
    drawn = {
        measure: svg_element(learning_curve(tables, measure), file, describe(tables, measure))
        for measure, file in CURVES.items()
    }
    page = page_environment().get_template("compare.html.j2")
    panels = min(len(tables.teachers), PANELS_A_ROW)
    store.write_bytes(PAGE, page.render(**facts, curves=drawn, panels=panels, settings=settings).encode())


def conclusion(tables: Tables) -> str:
    """The outcome at the largest budget, in plain sentences."""
    teacher, size = tables.teachers[-1], tables.sizes[-1]
    best = best_line(tables, teacher, size, "macro_f1")
    if best is None:
        return "Too few trials have finished to compare lines."
    mean = tables.mean(teacher, best, size, "macro_f1")
    assert mean is not None
    whose = "on the mean over teachers" if teacher == OVER_TEACHERS else f"with {teacher}'s labels"
    said = (
        f"At {describe_size(size, tables.n_pool)}, {best} has the highest macro-F1 {whose}: "
        f"{percent(mean.mean)}."
    )
    for reference in BASELINES:
        if difference := tables.mean(teacher, best, size, f"macro_f1_over_{reference}"):
            said += f" {_difference(difference, reference)}"
    return said


def _difference(mean: Mean, reference: str) -> str:
    where = "above" if mean.mean >= 0 else "below"
    size = Mean(abs(mean.mean), mean.half, mean.n)
    said = f"It is {points(size, mean.n)} points {where} {TITLES.get(reference, reference)}"
    if mean.half is None:
        return f"{said}; one seed gives no interval."
    return f"{said}, which chance may explain." if mean.half >= abs(mean.mean) else f"{said}."


# --- Files -----------------------------------------------------------------------------------------


def read_results(file: str | Path, names: Sequence[str]) -> list[Row]:
    """The rows of a ``results.csv``, possibly from another machine.

    Raises ConfigError if the file is not a results.csv, has other classes, or contains a non-numeric value.
    """
    try:
        frame = pd.read_csv(
            Path(file),
            dtype=dict.fromkeys(TEXT_COLUMNS, str),
            keep_default_na=False,  # a teacher may be named "NA"
            na_values={"agreement": ""},
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no CSV file"
        raise ConfigError(f"--add: {str(file)!r} cannot be read: {reason}") from None
    frame = frame.rename(columns=unescape_formula)
    frame = frame.map(lambda x: unescape_formula(x) if isinstance(x, str) else x)
    columns = result_columns(names)
    if missing := [name for name in columns if name not in frame]:
        raise ConfigError(
            f"--add: {str(file)!r} has no column {missing[0]!r}; give {RESULTS} of the same comparison"
        )
    for name in columns:
        known = frame[name] if name in TEXT_COLUMNS else pd.to_numeric(frame[name], errors="coerce")
        is_broken = known.isna() & (frame[name].notna() | (name != "agreement"))
        if is_broken.any():
            row = int(is_broken.argmax())
            raise ConfigError(
                f"--add: {str(file)!r} has {frame[name][row]!r} for {name!r} in line {row + 2}; correct it"
            )
    return frame[columns].to_dict("records")


def summary_frame(tables: Tables) -> pd.DataFrame:
    """One row per cell; ``_ci`` is half the width of the 95 % interval, ``_n`` the number of seeds."""
    differences = (f"{name}_over_{reference}" for reference in BASELINES for name in SCORES)
    suffixes = {"mean": "", "half": "_ci", "n": "_n"}
    columns = {
        f"{name}{suffix}": tables.means[part, name]
        for name in (*MEASURES, *differences)
        for part, suffix in suffixes.items()
    }
    return pd.DataFrame(columns).reset_index()


def class_frame(tables: Tables) -> pd.DataFrame:
    """One row per class and cell."""
    of_class = {name: tables.means.xs(f1_column(name), axis=1, level=1) for name in tables.names}
    frame = pd.concat(of_class, names=["class", *CELL])
    return frame.rename(columns={"mean": "f1", "half": "f1_ci"}).reset_index()


def _csv(frame: pd.DataFrame) -> bytes:
    safe = frame.rename(columns=escape_formula).map(lambda x: escape_formula(x) if isinstance(x, str) else x)
    return safe.to_csv(index=False, lineterminator="\n").encode()


def _in_markdown(facts: dict[str, Any]) -> str:
    tables: Tables = facts["tables"]
    lines = ["# Comparison", "", markdown(facts["conclusion"]), ""]
    if facts["note"]:
        lines += [f"**{facts['note']}**", ""]
    lines += [
        f"Means over {facts['seeds']} in percent, ± half the width of a 95 % interval (Student's t over "
        "seeds); bold: the best of a teacher's lines with a budget.",
        "",
        f"![Learning curves]({CURVES['macro_f1']}.svg)",
        "",
    ]
    for title, scores, differences in facts["scores"]:
        lines += [f"## {title}", "", *_grouped(*scores), ""]
        lines += [f"### {title}: paired differences, in points", "", *_grouped(*differences), ""]
    lines += ["## Agreement with the teacher", "", f"![Agreement]({CURVES['agreement']}.svg)", ""]
    lines += [*_grouped(*facts["agreement"]), ""]
    lines += ["## What it took", "", *_grouped(*facts["costs"]), ""]
    lines += [f"## F1 of each class at {facts['largest']}", ""]
    for teacher, header, rows in facts["classes"]:
        lines += [f"### {markdown(teacher)}", "", *_head(["class", *header])]
        for name, values in rows:
            shown = ("–" if value is None else f"{100 * value:.1f}" for value in values)
            lines.append(f"| {' | '.join([markdown(name), *shown])} |")
        lines.append("")
    lines.append(f"Every trial: {RESULTS}; all means: {SUMMARY}, {PER_CLASS}. Pool: {tables.n_pool:,} texts.")
    return "\n".join(lines) + "\n"


def _grouped(header: Sequence[str], groups: Sequence[Group]) -> list[str]:
    lines = _head(["teacher", "line", *header])
    for group in groups:
        for i, (name, cells) in enumerate(group.rows):
            texts = [f"**{cell.text}**" if cell.is_best else cell.text for cell in cells]
            teacher = markdown(group.teacher) if i == 0 else ""
            lines.append(f"| {' | '.join([teacher, markdown(name), *texts])} |")
    return lines


def _head(header: Sequence[str]) -> list[str]:
    left = 2 if header[0] == "teacher" else 1
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(markdown(name) for name in header)} |", f"| {' | '.join(rule)} |"]


# The colours of Okabe & Ito, without yellow, which is too pale for a line on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RANDOM_COLOUR = "#7F7F7F"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Line styles for results without a budget; all are black and differ by dashes.
LEVELS: dict[str, Any] = {GOLD: (0, (6, 2)), ALL: (0, (1.5, 1.5)), TEACHER: (0, (6, 2, 1, 2))}
PANEL_INCHES = (3.7, 2.9)
PANELS_A_ROW = 3
AXES = {"macro_f1": "macro-F1", "agreement": "agreement with the teacher"}
"""The measures with learning curves, with their axis labels."""


def learning_curve(tables: Tables, measure: str = "macro_f1") -> Figure:
    """A measure against the texts trained on, one panel per teacher; bands are 95 % intervals over seeds."""
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
    axes.set_title(literal(teacher), loc="left", fontsize=10)
    for line in (GOLD, ALL, TEACHER):
        if level := tables.mean(teacher, line, tables.n_pool, measure):
            axes.axhline(level.mean, color="black", linewidth=1.1, linestyle=LEVELS[line], label=TITLES[line])
    for (line, colour), marker in zip(_colours(tables.lines).items(), cycle(MARKERS), strict=False):
        found = [
            [tables.mean(teacher, line, size, name) for name in ("trained", measure)] for size in tables.sizes
        ]
        x = [trained.mean for trained, mean in found if trained and mean]
        means = [mean for trained, mean in found if trained and mean]
        if not x:
            continue
        axes.plot(
            x, [m.mean for m in means], color=colour, marker=marker, markersize=4.5, label=literal(line)
        )
        low, high = ([m.mean + sign * (m.half or 0) for m in means] for sign in (-1, 1))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        else:  # A band needs two points.
            axes.errorbar(x, [m.mean for m in means], [m.half or 0 for m in means], color=colour, capsize=3)
    _fit(axes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlim(0, 1.05 * tables.sizes[-1])  # The same in all panels, even before the first trial.


def _fit(axes: Axes) -> None:
    """Fit a panel's height to its lines: with few seeds, bands can be wider than all of [0, 1]."""
    # Lines whose label begins with an underscore are the caps of error bars.
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    values = [float(y) for line in lines for y in np.atleast_1d(line.get_ydata())]
    if not values:  # No trial is finished yet.
        return
    room = max(0.02, 0.12 * (max(values) - min(values)))
    axes.set_ylim(min(values) - room, max(values) + room)


def _colours(lines: Sequence[str]) -> dict[str, str]:
    colours = cycle(COLOURS)
    return {line: RANDOM_COLOUR if line == RANDOM else next(colours) for line in lines}


def describe(tables: Tables, measure: str = "macro_f1") -> str:
    """The figure as text, for people who cannot see it."""
    size, teacher = tables.sizes[-1], tables.teachers[-1]
    means = ((line, tables.mean(teacher, line, size, measure)) for line in tables.lines)
    ends = ", ".join(f"{line} {percent(mean.mean)}" for line, mean in means if mean)
    where = describe_size(size, tables.n_pool)
    name = AXES[measure][0].upper() + AXES[measure][1:]
    return f"{name} against texts trained on, a panel a teacher. {teacher}, at {where}: {ends}."
