"""Results of a comparison for tests of its tables and pages."""

from __future__ import annotations

from llkd_ray.comparison.tables import ALL, GOLD, RANDOM, Row, Tables, result_row, scores_of, tabulate

POOL, SMALL, LARGE = 1000, 40, 100
NAMES = ("sea", "<garden>")


def result(teacher: str, line: str, seed: int, size: int, f1: float, trained: int | None = None) -> Row:
    """Of a trial whose accuracy is 0.1 above its macro-F1, and whose classes lie 0.1 beside that.

    It agrees with its teacher, if it has one, in 0.2 more than it is right.
    """
    facts = {
        "size": size,
        "trained": trained or size,
        "labelled": 500,
        "teacher_tokens": 12_000,
        "accuracy": f1 + 0.1,
        "macro_f1": f1,
        "ece": 0.05,
        "pseudo_label_accuracy": 0.8,
        "f1_by_class": [f1 - 0.1, f1 + 0.1],
    } | ({"agreement": f1 + 0.3} if teacher else {})
    return result_row(teacher, line, seed, facts, POOL, NAMES)


def make_tables(results: list[Row], teachers: tuple[str, ...] = ("ann",), n_seeds: int = 2) -> Tables:
    scores = {
        teacher: scores_of(
            {"accuracy": 0.7 + i / 10, "macro_f1": 0.6 + i / 10, "ece": 0.1, "f1_by_class": [0.5, 0.7]}, NAMES
        )
        for i, teacher in enumerate(teachers)
    }
    lines = (GOLD, ALL, RANDOM, "rank")
    return tabulate(
        results, scores, lines=lines, sizes=(SMALL, LARGE), n_pool=POOL, names=NAMES, n_seeds=n_seeds
    )


def two_seeds(teacher: str = "ann", above: float = 0.0) -> list[Row]:
    """*rank* is above *random* by 0.10 and 0.14, *all* at 0.45 and 0.55."""
    trials = [
        (ALL, POOL, (0.45, 0.55), None),
        (RANDOM, LARGE, (0.40, 0.44), None),
        ("rank", LARGE, (0.50, 0.58), 80),
    ]
    return [
        result(teacher, line, seed, size, f1 + above, trained)
        for line, size, scores, trained in trials
        for seed, f1 in enumerate(scores)
    ]
