"""The figures of a comparison: means over seeds, paired differences, and tables like a paper's. Pure.

An interval here is a 95 % interval of the mean over seeds by Student's t. It says how far chance in the
student's start, the order of the texts and the draws of the policies moves a figure; it does not cover other
test texts, nor other teachers. With one seed there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student_t

GOLD, ALL, RANDOM, TEACHER = "gold", "all", "random", "teacher"
IN_WORDS = {GOLD: "gold labels (upper bound)", ALL: "all pseudo-labels", TEACHER: "the teacher itself"}
BASELINES = (RANDOM, ALL)
"""Lines that the others are set against, seed by seed."""
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


@dataclass(frozen=True)
class Result:
    """What one trial came to at one size."""

    teacher: str
    """Empty for *gold*, which has none."""
    line: str
    seed: int
    size: int
    """Texts that it was allowed to train on."""
    trained: float
    """Texts that it trained on: fewer where the policy takes no more."""
    trained_share: float
    labelled: float
    teacher_tokens: float
    accuracy: float
    macro_f1: float
    ece: float
    pseudo_label_accuracy: float
    f1_by_class: tuple[float, ...]
    agreement: float | None = None
    """With the teacher on the test texts; None for *gold*, and in results of an older version."""

    @classmethod
    def of(cls, teacher: str, line: str, seed: int, facts: Mapping[str, Any], n_pool: int) -> Result:
        """From the facts of a trial's round, as ``trial.run_trial`` gives them."""
        names = ("trained", "labelled", "teacher_tokens", *SCORES, "ece", "pseudo_label_accuracy")
        return cls(
            teacher,
            line,
            seed,
            facts["size"],
            **{name: facts[name] for name in names},
            agreement=facts.get("agreement"),
            trained_share=facts["trained"] / n_pool,
            f1_by_class=tuple(facts["f1_by_class"]),
        )


@dataclass(frozen=True)
class TeacherScore:
    """A teacher's own answers on the test set."""

    accuracy: float
    macro_f1: float
    f1_by_class: tuple[float, ...]


class Mean(NamedTuple):
    """A mean over ``n`` seeds; ``half`` is half the width of its interval, None with one seed."""

    mean: float
    half: float | None
    n: int


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and interval of at least one value."""
    found = list(values)
    n = len(found)
    half = student_t.ppf((1 + LEVEL) / 2, n - 1) * stdev(found) / n**0.5 if n > 1 else None
    return Mean(fmean(found), None if half is None else float(half), n)


@dataclass(frozen=True)
class Cell:
    """One line of one teacher at one size, over the seeds that are there."""

    figures: dict[str, Mean]
    """By the names of MEASURES; those that some result of the cell lacks are left out."""
    f1_by_class: tuple[Mean, ...]
    over: dict[str, dict[str, Mean]]
    """Accuracy and macro-F1 above a reference, over the seeds that both have; no entry where none has."""


@dataclass(frozen=True)
class Tables:
    """All that a comparison's report says."""

    teachers: tuple[str, ...]
    """With OVER_TEACHERS at the end where there are several."""
    lines: tuple[str, ...]
    """Those with a budget, *random* first."""
    sizes: tuple[int, ...]
    n_pool: int
    names: tuple[str, ...]
    """The classes."""
    n_seeds: int
    cells: dict[tuple[str, str, int], Cell]
    """By teacher, line and size; *gold* and *all* have the pool's size."""
    scores: dict[str, TeacherScore]

    def cell(self, teacher: str, line: str, size: int) -> Cell | None:
        return self.cells.get((teacher, line, size))

    def whole(self, teacher: str, line: str) -> Cell | None:
        """*gold* or *all*."""
        return self.cell(teacher, line, self.n_pool)

    def has(self, measure: str) -> bool:
        """Whether some line with a budget has a figure of it."""
        return any(measure in cell.figures for (_, line, _), cell in self.cells.items() if line in self.lines)


def tabulate(
    results: Sequence[Result],
    scores: Mapping[str, TeacherScore],
    *,
    lines: Sequence[str],
    sizes: Sequence[int],
    n_pool: int,
    names: Sequence[str],
    n_seeds: int,
) -> Tables:
    """Means and differences of whatever trials are there; ``scores`` names the teachers, in order."""
    everything = over_teachers(gold_for_all(results, tuple(scores)), tuple(scores))
    by_key: dict[tuple[str, str, int], dict[int, Result]] = {}
    for one in everything:
        by_key.setdefault((one.teacher, one.line, one.size), {})[one.seed] = one
    cells = {key: _cell(by_key, key, n_pool) for key in by_key}
    all_scores = dict(scores)
    if len(scores) > 1:
        all_scores[OVER_TEACHERS] = TeacherScore(
            fmean(score.accuracy for score in scores.values()),
            fmean(score.macro_f1 for score in scores.values()),
            _means_by_class(score.f1_by_class for score in scores.values()),
        )
    budgeted = tuple(line for line in lines if line not in (GOLD, ALL))
    return Tables(tuple(all_scores), budgeted, tuple(sizes), n_pool, tuple(names), n_seeds, cells, all_scores)


def gold_for_all(results: Sequence[Result], teachers: Sequence[str]) -> list[Result]:
    """*gold* has no teacher: the same result stands beside each."""
    return [
        Result(**{**asdict(one), "teacher": teacher})
        for one in results
        for teacher in ((one.teacher,) if one.teacher else teachers)
    ]


def over_teachers(results: Sequence[Result], teachers: Sequence[str]) -> list[Result]:
    """The results, and of several teachers their mean: of each line, seed and size that all of them have."""
    if len(teachers) < 2:
        return list(results)
    found: dict[tuple[str, int, int], list[Result]] = {}
    for one in results:
        found.setdefault((one.line, one.seed, one.size), []).append(one)
    means = []
    for (line, seed, size), those in found.items():
        if {one.teacher for one in those} == set(teachers):
            figures = {name: fmean(values) for name, values in _measured(those).items()}
            by_class = _means_by_class(one.f1_by_class for one in those)
            means.append(Result(OVER_TEACHERS, line, seed, size, **figures, f1_by_class=by_class))
    return [*results, *means]


def _measured(results: Sequence[Result]) -> dict[str, list[float]]:
    """The values of each measure that all of the results have."""
    values = {name: [getattr(one, name) for one in results] for name in MEASURES}
    return {name: of_all for name, of_all in values.items() if None not in of_all}


def _means_by_class(many: Iterable[Sequence[float]]) -> tuple[float, ...]:
    return tuple(fmean(of_class) for of_class in zip(*many, strict=True))


def _cell(
    by_key: Mapping[tuple[str, str, int], Mapping[int, Result]], key: tuple[str, str, int], n_pool: int
) -> Cell:
    teacher, line, size = key
    those = by_key[key]
    over: dict[str, dict[str, Mean]] = {}
    for reference in BASELINES:
        others = by_key.get((teacher, reference, n_pool if reference == ALL else size), {})
        pairs = [(one, others[seed]) for seed, one in those.items() if seed in others]
        if pairs and line not in (reference, GOLD, ALL):
            over[reference] = {
                name: mean_of(getattr(one, name) - getattr(other, name) for one, other in pairs)
                for name in SCORES
            }
    by_class = zip(*(one.f1_by_class for one in those.values()), strict=True)
    return Cell(
        {name: mean_of(values) for name, values in _measured(list(those.values())).items()},
        tuple(mean_of(of_class) for of_class in by_class),
        over,
    )


# --- Tables as people read them --------------------------------------------------------------------


class Shown(NamedTuple):
    """A cell of a table."""

    text: str
    is_best: bool = False
    """The best of its teacher's lines with this budget."""


class Group(NamedTuple):
    """The rows of one teacher: the row's name, and its cells."""

    teacher: str
    rows: list[tuple[str, list[Shown]]]


def describe_size(size: int, n_pool: int) -> str:
    return f"{size:,} texts ({round(100 * size / n_pool, 1):g}\u202f%)"  # A narrow space that does not break.


def points(mean: Mean | None, n_seeds: int, signed: bool = False) -> str:
    """In percent or percentage points, with interval; the number of seeds where it is not the usual one."""
    if mean is None:
        return MISSING
    text = f"{100 * mean.mean:{'+' if signed else ''}.1f}".replace("-", "−")
    if mean.half is not None:
        text += f" ± {100 * mean.half:.1f}"
    return text if mean.n == n_seeds and n_seeds > 1 else f"{text} (n={mean.n})"


def score_table(tables: Tables, measure: str) -> tuple[list[str], list[Group]]:
    """Lines by budgets, one group a teacher; the last column holds what knows no budget.

    Agreement is with the teacher, so the teacher itself and *gold*, which has none, are left out of its rows.
    """
    header = [*(describe_size(size, tables.n_pool) for size in tables.sizes), "no budget"]
    groups = []
    for teacher in tables.teachers:
        best = {size: _best(tables, teacher, size, measure) for size in tables.sizes}
        rows = []
        for line in tables.lines:
            shown = []
            for size in tables.sizes:
                cell = tables.cell(teacher, line, size)
                mean = cell.figures.get(measure) if cell else None
                shown.append(Shown(points(mean, tables.n_seeds), best[size] == line))
            rows.append((line, [*shown, Shown("")]))
        blank = [Shown("")] * len(tables.sizes)
        for line in (ALL, GOLD) if measure in SCORES else (ALL,):
            cell = tables.whole(teacher, line)
            mean = cell.figures.get(measure) if cell else None
            rows.append((IN_WORDS[line], [*blank, Shown(points(mean, tables.n_seeds))]))
        if measure in SCORES:
            own = getattr(tables.scores[teacher], measure)
            rows.append((IN_WORDS[TEACHER], [*blank, Shown(f"{100 * own:.1f}")]))
        groups.append(Group(teacher, rows))
    return header, groups


def _best(tables: Tables, teacher: str, size: int, measure: str) -> str | None:
    means = {
        line: cell.figures[measure].mean
        for line in tables.lines
        if (cell := tables.cell(teacher, line, size)) and measure in cell.figures
    }
    return max(means, key=lambda line: means[line]) if len(means) > 1 else None


def difference_table(tables: Tables, measure: str) -> tuple[list[str], list[Group]]:
    """How far the lines are above *random* at the same budget and above all pseudo-labels."""
    header = [
        f"{describe_size(size, tables.n_pool)}, over {IN_WORDS.get(reference, reference)}"
        for size in tables.sizes
        for reference in BASELINES
    ]
    groups = []
    for teacher in tables.teachers:
        rows = []
        for line in tables.lines:
            shown = []
            for size in tables.sizes:
                cell = tables.cell(teacher, line, size)
                for reference in BASELINES:
                    difference = cell.over.get(reference) if cell else None
                    mean = difference[measure] if difference else None
                    shown.append(Shown(points(mean, tables.n_seeds, signed=True)))
            rows.append((line, shown))
        groups.append(Group(teacher, rows))
    return header, groups


def cost_table(tables: Tables) -> tuple[list[str], list[Group]]:
    """What each line took: texts trained on and labelled, the teacher's tokens, how right its labels were."""
    header = [
        "budget",
        *(MEASURES[name] for name in ("trained", "trained_share", "labelled", "teacher_tokens")),
        MEASURES["pseudo_label_accuracy"],
    ]
    groups = []
    for teacher in tables.teachers:
        rows = []
        wanted = [(line, size) for line in tables.lines for size in tables.sizes]
        for line, size in [*wanted, (ALL, tables.n_pool)]:
            if cell := tables.cell(teacher, line, size):
                figures = cell.figures
                counts = [f"{figures[name].mean:,.0f}" for name in ("trained", "labelled", "teacher_tokens")]
                share = f"{100 * figures['trained_share'].mean:.1f} %"
                right = points(figures["pseudo_label_accuracy"], tables.n_seeds)
                texts = (describe_size(size, tables.n_pool), counts[0], share, *counts[1:], right)
                rows.append((IN_WORDS.get(line, line), [Shown(text) for text in texts]))
        groups.append(Group(teacher, rows))
    return header, groups


def class_table(tables: Tables, teacher: str) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """F1 of each class (rows) by each line at the largest budget, and by what knows no budget."""
    cells = [tables.cell(teacher, line, tables.sizes[-1]) for line in tables.lines]
    cells += [tables.whole(teacher, line) for line in (ALL, GOLD)]
    header = [*tables.lines, *(IN_WORDS[line] for line in (ALL, GOLD, TEACHER))]
    rows = []
    for c, name in enumerate(tables.names):
        values: list[float | None] = [cell.f1_by_class[c].mean if cell else None for cell in cells]
        rows.append((name, [*values, tables.scores[teacher].f1_by_class[c]]))
    return header, rows
