"""The figures of a comparison: means over seeds, paired differences, and the tables of the report. Pure.

Every interval here is a 95 % interval of the mean over seeds, by Student's t. It covers the randomness of the
student's initialisation, the order of the texts and the sampling of the policies; it does not cover other
test texts or other teachers. With one seed there is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

GOLD, ALL, RANDOM, TEACHER = "gold", "all", "random", "teacher"
TITLES = {GOLD: "gold labels (upper bound)", ALL: "all pseudo-labels", TEACHER: "the teacher itself"}
BASELINES = (RANDOM, ALL)
"""Lines that the others are compared with, seed by seed."""
OVER_TEACHERS = "mean over teachers"
LEVEL = 0.95
MISSING = "–"
MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "agreement": "agrees with the teacher",
    "pseudo_label_accuracy": "pseudo-labels right",
    "trained": "trained on",
    "trained_share": "share of the pool",
    "labelled": "labelled",
    "teacher_tokens": "teacher tokens",
}
SCORES = ("accuracy", "macro_f1")
CELL = ["teacher", "line", "size"]
Row = dict[str, Any]
"""A row of results.csv: CELL, ``seed``, MEASURES and the F1 of each class."""


def f1_column(name: str) -> str:
    """The column of a class's F1."""
    return f"f1 {name}"


def result_columns(names: Sequence[str]) -> list[str]:
    """The columns of results.csv, for classes with these names."""
    return [*CELL, "seed", *MEASURES, *map(f1_column, names)]


def scores_of(facts: Mapping[str, Any], names: Sequence[str]) -> Row:
    """The measures on the test set, from the facts that ``trial.against_gold`` returns."""
    by_class = {f1_column(name): f1 for name, f1 in zip(names, facts["f1_by_class"], strict=True)}
    return {name: facts[name] for name in (*SCORES, "ece")} | by_class


def result_row(
    teacher: str, line: str, seed: int, facts: Mapping[str, Any], n_pool: int, names: Sequence[str]
) -> Row:
    """The row of a trial at one size, from the facts of ``trial.run_trial``.

    *gold* has no teacher (the empty name), and therefore no agreement (None).
    """
    kept = ("agreement", "pseudo_label_accuracy", "trained", "labelled", "teacher_tokens")
    return {
        "teacher": teacher,
        "line": line,
        "size": facts["size"],
        "seed": seed,
        **{name: facts.get(name) for name in kept},
        "trained_share": facts["trained"] / n_pool,
        **scores_of(facts, names),
    }


class Mean(NamedTuple):
    """A mean over ``n`` seeds; ``half`` is half the width of its interval, None with one seed.

    ``n`` is 0 for the teacher itself, which does not depend on the seed.
    """

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Tables:
    """The data of a comparison's report."""

    teachers: tuple[str, ...]
    """With OVER_TEACHERS at the end if there are several."""
    lines: tuple[str, ...]
    """The lines with a budget, *random* first."""
    sizes: tuple[int, ...]
    n_pool: int
    names: tuple[str, ...]
    """The classes."""
    n_seeds: int
    means: pd.DataFrame
    """One row per CELL; columns are (``mean``, ``half`` or ``n``; measure). Lines without a budget (*gold*,
    *all*, the teacher itself) have the pool's size. ``macro_f1_over_random`` is a paired difference."""

    def mean(self, teacher: str, line: str, size: int, measure: str) -> Mean | None:
        """None if no trial has a value."""
        key = (teacher, line, size)
        if key not in self.means.index:
            return None
        cell = self.means.loc[key]
        mean, half, n = (float(cell[part, measure]) for part in ("mean", "half", "n"))
        return None if np.isnan(mean) else Mean(mean, None if np.isnan(half) else half, int(n))


def tabulate(
    results: Sequence[Row],
    scores: Mapping[str, Row],
    *,
    lines: Sequence[str],
    sizes: Sequence[int],
    n_pool: int,
    names: Sequence[str],
    n_seeds: int,
) -> Tables:
    """Means and differences of the finished trials; ``scores`` are the teachers' own scores, in order."""
    measures = [*MEASURES, *map(f1_column, names)]
    own = [
        {"teacher": teacher, "line": TEACHER, "size": n_pool, "seed": 0, **score}
        for teacher, score in scores.items()
    ]
    frame = pd.DataFrame([*results, *own], columns=result_columns(names))
    frame = frame.astype(dict.fromkeys(measures, float))
    is_gold = frame["teacher"] == ""
    frame = pd.concat([frame[~is_gold], *(frame[is_gold].assign(teacher=teacher) for teacher in scores)])
    teachers = tuple(scores)
    if len(teachers) > 1:
        trial = ["line", "size", "seed"]
        n_teachers = frame.groupby(trial)["teacher"].transform("nunique")
        of_all = frame[n_teachers == len(teachers)].groupby(trial, as_index=False)[measures].mean()
        frame = pd.concat([frame, of_all.assign(teacher=OVER_TEACHERS)])
        teachers = (*teachers, OVER_TEACHERS)
    for reference in BASELINES:
        frame = _with_differences(frame, reference)

    budgeted = tuple(line for line in lines if line not in (GOLD, ALL))
    order = {"teacher": teachers, "line": (*budgeted, ALL, GOLD, TEACHER)}
    frame = frame.sort_values(
        CELL, key=lambda column: column.map(order[column.name].index) if column.name in order else column
    )
    cells = frame.drop(columns="seed").groupby(CELL, sort=False)
    n = cells.count()
    means = pd.concat(
        {"mean": cells.mean(), "half": cells.sem() * student_t.ppf((1 + LEVEL) / 2, n - 1), "n": n}, axis=1
    )
    means.loc[means.index.get_level_values("line") == TEACHER, "n"] = 0
    return Tables(teachers, budgeted, tuple(sizes), n_pool, tuple(names), n_seeds, means)


def _with_differences(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The scores minus those of the reference (same teacher and seed; for *random*, also the same size)."""
    pair = ["teacher", "seed", *(["size"] if reference == RANDOM else [])]
    others = frame.loc[frame["line"] == reference, [*pair, *SCORES]]
    paired = frame.merge(others, on=pair, how="left", suffixes=("", " of reference"))
    is_compared = ~paired["line"].isin([reference, GOLD, ALL, TEACHER])
    for name in SCORES:
        difference = paired[name] - paired.pop(f"{name} of reference")
        paired[f"{name}_over_{reference}"] = difference.where(is_compared)
    return paired


# --- Tables as people read them --------------------------------------------------------------------


class TableCell(NamedTuple):
    """A cell of a table."""

    text: str
    is_best: bool = False
    """The best of its teacher's lines with this budget."""


class Group(NamedTuple):
    """The rows of one teacher, as (row name, cells)."""

    teacher: str
    rows: list[tuple[str, list[TableCell]]]


def describe_size(size: int, n_pool: int) -> str:
    return f"{size:,} texts ({round(100 * size / n_pool, 1):g}\u202f%)"  # A narrow no-break space.


def points(mean: Mean | None, n_seeds: int, signed: bool = False) -> str:
    """In percent or percentage points, with interval, and the number of seeds unless it is ``n_seeds``."""
    if mean is None:
        return MISSING
    text = f"{100 * mean.mean:{'+' if signed else ''}.1f}".replace("-", "−")
    if mean.half is not None:
        text += f" ± {100 * mean.half:.1f}"
    return text if mean.n == 0 or mean.n == n_seeds > 1 else f"{text} (n={mean.n})"


def score_table(tables: Tables, measure: str) -> tuple[list[str], list[Group]]:
    """Lines by budgets, one group per teacher; the last column is for lines without a budget.

    For agreement, the teacher itself and *gold* (which has no teacher) are left out of the rows.
    """
    header = [*(describe_size(size, tables.n_pool) for size in tables.sizes), "no budget"]
    blank = [TableCell("")] * len(tables.sizes)
    groups = []
    for teacher in tables.teachers:
        best = {size: best_line(tables, teacher, size, measure) for size in tables.sizes}
        rows = []
        for line in tables.lines:
            cells = [
                TableCell(
                    points(tables.mean(teacher, line, size, measure), tables.n_seeds), best[size] == line
                )
                for size in tables.sizes
            ]
            rows.append((line, [*cells, TableCell("")]))
        for line in (ALL, GOLD, TEACHER) if measure in SCORES else (ALL,):
            mean = tables.mean(teacher, line, tables.n_pool, measure)
            rows.append((TITLES[line], [*blank, TableCell(points(mean, tables.n_seeds))]))
        groups.append(Group(teacher, rows))
    return header, groups


def best_line(tables: Tables, teacher: str, size: int, measure: str) -> str | None:
    """The line with the highest mean; None if there are fewer than two to compare."""
    found = {line: tables.mean(teacher, line, size, measure) for line in tables.lines}
    means = {line: mean.mean for line, mean in found.items() if mean}
    return max(means, key=lambda line: means[line]) if len(means) > 1 else None


def difference_table(tables: Tables, measure: str) -> tuple[list[str], list[Group]]:
    """How far the lines are above *random* at the same budget, and above all pseudo-labels."""
    columns = [(size, reference) for size in tables.sizes for reference in BASELINES]
    header = [
        f"{describe_size(size, tables.n_pool)}, over {TITLES.get(reference, reference)}"
        for size, reference in columns
    ]
    groups = []
    for teacher in tables.teachers:
        rows = []
        for line in tables.lines:
            means = (tables.mean(teacher, line, size, f"{measure}_over_{ref}") for size, ref in columns)
            rows.append((line, [TableCell(points(mean, tables.n_seeds, signed=True)) for mean in means]))
        groups.append(Group(teacher, rows))
    return header, groups


def cost_table(tables: Tables) -> tuple[list[str], list[Group]]:
    """The cost of each line: texts trained on and labelled, teacher tokens, and accuracy of its labels."""
    counts = ("trained", "labelled", "teacher_tokens")
    header = ["budget", *(MEASURES[name] for name in (*counts, "trained_share", "pseudo_label_accuracy"))]
    cells = [(line, size) for line in tables.lines for size in tables.sizes]
    groups = []
    for teacher in tables.teachers:
        rows = []
        for line, size in [*cells, (ALL, tables.n_pool)]:
            means = {name: tables.mean(teacher, line, size, name) for name in MEASURES}
            if means["trained"] and means["trained_share"]:
                texts = [
                    describe_size(size, tables.n_pool),
                    *(f"{mean.mean:,.0f}" if (mean := means[name]) else MISSING for name in counts),
                    f"{100 * means['trained_share'].mean:.1f} %",
                    points(means["pseudo_label_accuracy"], tables.n_seeds),
                ]
                rows.append((TITLES.get(line, line), [TableCell(text) for text in texts]))
        groups.append(Group(teacher, rows))
    return header, groups


def class_table(tables: Tables, teacher: str) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """F1 of each class (rows), for each line at the largest budget and for lines without a budget."""
    columns = [(line, tables.sizes[-1]) for line in tables.lines]
    columns += [(line, tables.n_pool) for line in (ALL, GOLD, TEACHER)]
    rows = []
    for name in tables.names:
        means = (tables.mean(teacher, line, size, f1_column(name)) for line, size in columns)
        rows.append((name, [mean.mean if mean else None for mean in means]))
    return [TITLES.get(line, line) for line, _ in columns], rows
