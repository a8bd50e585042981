"""Results of a comparison for tests of its tables and pages."""

from __future__ import annotations

from llkd_ray.comparison.tables import ALL, GOLD, RANDOM, Result, Tables, TeacherScore, tabulate

POOL, SMALL, LARGE = 1000, 40, 100


NAMES = ("sea", "<garden>")


def result(teacher: str, line: str, seed: int, size: int, f1: float, trained: int | None = None) -> Result:
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
    return Result.of(teacher, line, seed, facts, POOL)


def make_tables(results: list[Result], teachers: tuple[str, ...] = ("ann",), n_seeds: int = 2) -> Tables:
    scores = {
        teacher: TeacherScore(0.7 + i / 10, 0.6 + i / 10, (0.5, 0.7)) for i, teacher in enumerate(teachers)
    }
    lines = (GOLD, ALL, RANDOM, "rank")
    return tabulate(
        results, scores, lines=lines, sizes=(SMALL, LARGE), n_pool=POOL, names=NAMES, n_seeds=n_seeds
    )


def two_seeds(teacher: str = "ann", above: float = 0.0) -> list[Result]:
    """*rank* is above *random* by 0.10 and 0.14, *all* at 0.45 and 0.55."""
    return [
        *(result(teacher, ALL, seed, POOL, f1 + above) for seed, f1 in ((0, 0.45), (1, 0.55))),
        *(result(teacher, RANDOM, seed, LARGE, f1 + above) for seed, f1 in ((0, 0.40), (1, 0.44))),
        *(
            result(teacher, "rank", seed, LARGE, f1 + above, trained=80)
            for seed, f1 in ((0, 0.50), (1, 0.58))
        ),
    ]
