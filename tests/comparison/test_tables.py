"""A comparison's figures, against numbers worked out by hand; and what is written of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from comparison_results import LARGE, NAMES, POOL, SMALL, make_tables, result, two_seeds

from llkd_ray.comparison.report import (
    CURVES,
    MARKDOWN,
    PAGE,
    PER_CLASS,
    RESULTS,
    SUMMARY,
    conclusion,
    read_results,
    write_comparison,
)
from llkd_ray.comparison.tables import (
    ALL,
    GOLD,
    OVER_TEACHERS,
    RANDOM,
    TEACHER,
    Mean,
    class_table,
    cost_table,
    difference_table,
    points,
    score_table,
)
from llkd_ray.config.base import ConfigError
from llkd_ray.storage.run_dir import RunStore

ATTACK = "_=<script>x</script>|$\\frac$"
OVER_RANDOM, OVER_ALL = "macro_f1_over_random", "macro_f1_over_all"


def write(folder: Path, results, tables=None) -> None:
    store = RunStore(str(folder))
    write_comparison(store, tables or make_tables(results), results, settings="a: <b>", missing=3, trials=9)


def test_means_have_students_interval():
    # Deviations 1, 0, -1 hundredths: standard deviation 0.01; t of 2 degrees of freedom at 97.5 % is 4.3027.
    results = [result("ann", "rank", seed, LARGE, 0.5 + (seed - 1) / 100, trained=80) for seed in range(3)]
    tables = make_tables(results)
    expected = pytest.approx((0.5, 0.043027 / 3**0.5, 3), rel=1e-4)
    assert tables.mean("ann", "rank", LARGE, "macro_f1") == expected
    assert tables.mean("ann", "rank", LARGE, "accuracy").mean == pytest.approx(0.6)
    assert tables.mean("ann", "rank", LARGE, "trained_share").mean == pytest.approx(0.08)
    by_class = [tables.mean("ann", "rank", LARGE, f"f1 {name}").mean for name in NAMES]
    assert by_class == pytest.approx([0.4, 0.6])
    assert tables.mean("ann", "rank", SMALL, "macro_f1") is None


@pytest.mark.parametrize(
    ("mean", "n_seeds", "shown"),
    [
        (Mean(0.5, None, 1), 1, "50.0 (n=1)"),
        (Mean(0.5, 0.0, 2), 2, "50.0 ± 0.0"),
        (Mean(0.5, 0.0, 2), 3, "50.0 ± 0.0 (n=2)"),
        (Mean(0.5, None, 0), 2, "50.0"),
        (None, 1, "–"),
    ],
)
def test_the_number_of_seeds_is_said_where_some_are_missing(mean, n_seeds, shown):
    assert points(mean, n_seeds) == shown


def test_differences_are_paired_by_seed():
    tables = make_tables([*two_seeds(), result("", GOLD, 0, POOL, 0.9)])
    # t of 1 degree of freedom at 97.5 % is 12.7062; half the difference is the standard error of two.
    found = tables.mean("ann", "rank", LARGE, OVER_RANDOM)
    assert found == pytest.approx((0.12, 12.7062 * 0.02, 2), rel=1e-4)
    assert tables.mean("ann", "rank", LARGE, OVER_ALL) == pytest.approx((0.04, 12.7062 * 0.01, 2), rel=1e-4)
    for line in (GOLD, ALL, TEACHER):
        assert tables.mean("ann", line, POOL, OVER_RANDOM) is tables.mean("ann", line, POOL, OVER_ALL) is None
    assert tables.mean("ann", RANDOM, LARGE, OVER_RANDOM) is None
    assert tables.mean("ann", RANDOM, LARGE, OVER_ALL).n == 2
    # A seed without its partner is no pair.
    results = [row for row in two_seeds() if (row["line"], row["seed"]) != (RANDOM, 0)]
    found = make_tables(results).mean("ann", "rank", LARGE, OVER_RANDOM)
    assert (found.mean, found.half, found.n) == (pytest.approx(0.14), None, 1)
    alone = make_tables([row for row in results if row["line"] == "rank"])
    assert alone.mean("ann", "rank", LARGE, OVER_RANDOM) is None


def test_gold_stands_beside_every_teacher_and_teachers_have_a_mean():
    results = [*two_seeds("ann"), *two_seeds("bob", above=0.2), result("", GOLD, 0, POOL, 0.9)]
    tables = make_tables(results, ("ann", "bob"))
    assert tables.teachers == ("ann", "bob", OVER_TEACHERS)
    for teacher in tables.teachers:
        assert tables.mean(teacher, GOLD, POOL, "macro_f1").mean == pytest.approx(0.9)
    assert tables.mean(OVER_TEACHERS, "rank", LARGE, "macro_f1").mean == pytest.approx(0.64)
    assert tables.mean(OVER_TEACHERS, "rank", LARGE, OVER_RANDOM).mean == pytest.approx(0.12)
    assert tables.mean(OVER_TEACHERS, TEACHER, POOL, "macro_f1").mean == pytest.approx(0.65)
    # The seed that one teacher lacks is left out of the mean.
    some = [row for row in results if (row["teacher"], row["seed"]) != ("bob", 0)]
    found = make_tables(some, ("ann", "bob")).mean(OVER_TEACHERS, "rank", LARGE, "macro_f1")
    assert (found.mean, found.n) == (pytest.approx(0.68), 1)
    # Gold has no teacher with whom to agree, and a teacher is one.
    _, groups = score_table(tables, "agreement")
    assert [group.teacher for group in groups] == ["ann", "bob", OVER_TEACHERS]
    rows = {name: [cell.text for cell in cells] for name, cells in groups[-1].rows}
    assert list(rows) == [RANDOM, "rank", "all pseudo-labels"]
    assert rows["rank"] == ["–", "94.0 ± 50.8", ""]
    assert rows["all pseudo-labels"] == ["", "", "90.0 ± 63.5"]


def test_the_tables_show_all_lines_with_the_best_marked():
    tables = make_tables(two_seeds())
    header, (group,) = score_table(tables, "macro_f1")
    assert header == ["40 texts (4\u202f%)", "100 texts (10\u202f%)", "no budget"]
    assert [(name, [cell.text for cell in cells]) for name, cells in group.rows] == [
        (RANDOM, ["–", "42.0 ± 25.4", ""]),
        ("rank", ["–", "54.0 ± 50.8", ""]),
        ("all pseudo-labels", ["", "", "50.0 ± 63.5"]),
        ("gold labels (upper bound)", ["", "", "–"]),
        ("the teacher itself", ["", "", "60.0"]),
    ]
    best = [(name, i) for name, cells in group.rows for i in range(3) if cells[i].is_best]
    assert best == [("rank", 1)]

    header, (group,) = difference_table(tables, "macro_f1")
    shown = dict(zip(header, (cell.text for cell in dict(group.rows)["rank"]), strict=True))
    assert shown["100 texts (10\u202f%), over random"] == "+12.0 ± 25.4"
    assert shown["40 texts (4\u202f%), over random"] == "–"
    header, (group,) = cost_table(tables)
    texts = dict(zip(header, (cell.text for cell in dict(group.rows)["rank"]), strict=True))
    assert texts == {
        "budget": "100 texts (10\u202f%)", "trained on": "80", "labelled": "500", "teacher tokens": "12,000",
        "share of the pool": "8.0 %", "pseudo-labels right": "80.0 ± 0.0",
    }  # fmt: skip
    header, rows = class_table(tables, "ann")
    assert dict(zip(header, rows[0][1], strict=True)) == {
        RANDOM: pytest.approx(0.32),
        "rank": pytest.approx(0.44),
        "all pseudo-labels": pytest.approx(0.40),
        "gold labels (upper bound)": None,
        "the teacher itself": 0.5,
    }


def test_the_conclusion_names_the_best_line_and_admits_chance():
    said = conclusion(make_tables(two_seeds()))
    assert "rank has the highest macro-F1 with ann's labels: 54.0" in said
    assert "12.0 ± 25.4 points above random, which chance may explain" in said
    sure = [result("ann", line, seed, LARGE, f1 + 0.01 * seed) for line, f1 in ((RANDOM, 0.4), ("rank", 0.9))
            for seed in (0, 1)]  # fmt: skip
    assert "points above random." in conclusion(make_tables(sure))
    assert "Too few" in conclusion(make_tables([]))


@pytest.mark.parametrize("n_results", [0, 1, None])
def test_all_files_are_written_however_few_trials_there_are(tmp_path: Path, n_results: int | None):
    results = two_seeds(ATTACK)[:n_results]
    write(tmp_path, results, make_tables(results, (ATTACK,)))
    page = (tmp_path / PAGE).read_text()
    assert "3 of 9 trials are missing" in page
    assert not any(outside in page for outside in ("<script", 'href="http', 'src="'))
    # A bar in a name does not make a column.
    text = (tmp_path / MARKDOWN).read_text()
    table = text[text.index("## Macro-F1") :].split("\n\n")[1].splitlines()
    assert {row.replace("\\|", "").count("|") for row in table} == {6}
    for curve in CURVES.values():
        assert (tmp_path / f"{curve}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{curve}.svg").read_text()
    summary, by_class = (list(csv.DictReader((tmp_path / name).open())) for name in (SUMMARY, PER_CLASS))
    by_line = {row["line"]: row for row in summary}
    assert len(summary) == len(by_line) == len(by_class) / 2 == len({row["line"] for row in results}) + 1
    assert (by_line[TEACHER]["macro_f1"], by_line[TEACHER]["trained"]) == ("0.6", "")
    if n_results is None:
        assert list(by_line) == [RANDOM, "rank", ALL, TEACHER]
        assert float(by_line["rank"][OVER_RANDOM]) == pytest.approx(0.12)
        assert (by_line["rank"]["size"], by_line["rank"]["macro_f1_n"]) == ("100", "2")
        assert by_line[RANDOM][OVER_RANDOM] == ""


@pytest.mark.parametrize("teacher", ["NA", "=1+1;-1"])
def test_results_come_back_as_they_were_written(tmp_path, teacher):
    results = [*two_seeds(teacher), result("", GOLD, 0, POOL, 1 / 3)]
    write(tmp_path, results, make_tables(results, (teacher,)))
    found = read_results(tmp_path / RESULTS, NAMES)
    pd.testing.assert_frame_equal(
        pd.DataFrame(found), pd.DataFrame(results)[list(found[0])], check_exact=True, check_dtype=False
    )
    before = (tmp_path / RESULTS).read_bytes()
    write(tmp_path, found, make_tables(found, (teacher,)))
    assert (tmp_path / RESULTS).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1\xff\xfe", "cannot be read: it is no CSV file"),
        (None, "cannot be read: No such file"),
        (b"teacher,line,size\nann,rank,1\n", "has no column 'seed'; give results.csv of the same comparison"),
        ("{header}\nann,random\n", "for 'size' in line 2"),
        ("{header}\n{line}\n{broken}\n", "has 'many' for 'size' in line 3"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_in_one_line(tmp_path, content, said):
    write(tmp_path, [result("ann", RANDOM, 0, SMALL, 0.5)], make_tables(two_seeds()))
    header, line = (tmp_path / RESULTS).read_text().splitlines()
    if isinstance(content, str):
        broken = line.replace(f",{SMALL},", ",many,", 1)
        content = content.format(header=header, line=line, broken=broken).encode()
    (tmp_path / RESULTS).unlink()
    if content is not None:
        (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_results(tmp_path / RESULTS, NAMES)
    assert str(caught.value).startswith("--add: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
