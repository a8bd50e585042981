"""A comparison's figures, against numbers worked out by hand; and what is written of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from comparison_results import LARGE, NAMES, POOL, SMALL, make_tables, result, two_seeds

from llkd_ray.comparison.report import (
    CURVES,
    MARKDOWN,
    PAGE,
    RESULTS,
    conclusion,
    read_results,
    summary_rows,
    write_comparison,
)
from llkd_ray.comparison.tables import (
    ALL,
    GOLD,
    OVER_TEACHERS,
    RANDOM,
    class_table,
    cost_table,
    difference_table,
    mean_of,
    points,
    score_table,
)
from llkd_ray.config.base import ConfigError
from llkd_ray.storage.run_dir import RunStore

ATTACK = "<script>x</script>|"


def test_the_interval_is_students_t():
    # Deviations 1, 0, -1: standard deviation 1; t of 2 degrees of freedom at 97.5 % is 4.3027.
    mean, half, n = mean_of([1.0, 2.0, 3.0])
    assert (mean, n) == (2.0, 3)
    assert half == pytest.approx(4.302653 / 3**0.5)


def test_one_seed_has_no_interval_and_says_so():
    one = mean_of([0.5])
    assert one.half is None
    assert points(one, n_seeds=1) == "50.0 (n=1)"
    assert points(None, n_seeds=1) == "–"


def test_the_number_of_seeds_is_said_where_some_are_missing():
    two = mean_of([0.5, 0.5])
    assert points(two, n_seeds=2) == "50.0 ± 0.0"
    assert points(two, n_seeds=3) == "50.0 ± 0.0 (n=2)"


def test_means_and_shares():
    tables = make_tables(two_seeds())
    cell = tables.cell("ann", "rank", LARGE)
    assert cell.figures["macro_f1"].mean == pytest.approx(0.54)
    assert cell.figures["accuracy"].mean == pytest.approx(0.64)
    # t of 1 degree of freedom at 97.5 % is 12.7062; half the difference is the standard error of two.
    assert cell.figures["macro_f1"].half == pytest.approx(12.7062 * 0.04, rel=1e-4)
    assert cell.figures["trained_share"].mean == pytest.approx(0.08)
    assert [mean.mean for mean in cell.f1_by_class] == pytest.approx([0.44, 0.64])


def test_differences_are_paired_by_seed():
    over = make_tables(two_seeds()).cell("ann", "rank", LARGE).over
    assert over[RANDOM]["macro_f1"].mean == pytest.approx(0.12)
    assert over[RANDOM]["macro_f1"].half == pytest.approx(12.7062 * 0.02, rel=1e-4)
    assert over[ALL]["macro_f1"].mean == pytest.approx(0.04)
    assert over[ALL]["macro_f1"].half == pytest.approx(12.7062 * 0.01, rel=1e-4)


def test_a_seed_without_its_partner_is_no_pair():
    results = [one for one in two_seeds() if (one.line, one.seed) != (RANDOM, 0)]
    over = make_tables(results).cell("ann", "rank", LARGE).over
    assert over[RANDOM]["macro_f1"] == pytest.approx((0.14, None, 1))
    assert over[ALL]["macro_f1"].n == 2
    alone = make_tables([one for one in results if one.line == "rank"])
    assert alone.cell("ann", "rank", LARGE).over == {}


def test_the_references_are_set_against_nothing():
    tables = make_tables([*two_seeds(), result("", GOLD, 0, POOL, 0.9)])
    assert tables.whole("ann", GOLD).over == {}
    assert tables.whole("ann", ALL).over == {}
    assert set(tables.cell("ann", RANDOM, LARGE).over) == {ALL}


def test_gold_stands_beside_every_teacher_and_teachers_have_a_mean():
    results = [*two_seeds("ann"), *two_seeds("bob", above=0.2), result("", GOLD, 0, POOL, 0.9)]
    tables = make_tables(results, ("ann", "bob"))
    assert tables.teachers == ("ann", "bob", OVER_TEACHERS)
    for teacher in tables.teachers:
        assert tables.whole(teacher, GOLD).figures["macro_f1"].mean == pytest.approx(0.9)
    assert tables.cell(OVER_TEACHERS, "rank", LARGE).figures["macro_f1"].mean == pytest.approx(0.64)
    assert tables.cell(OVER_TEACHERS, "rank", LARGE).over[RANDOM]["macro_f1"].mean == pytest.approx(0.12)
    assert tables.scores[OVER_TEACHERS].macro_f1 == pytest.approx(0.65)


def test_the_mean_over_teachers_leaves_out_what_a_teacher_lacks():
    results = [*two_seeds("ann"), *(one for one in two_seeds("bob") if one.seed == 1)]
    tables = make_tables(results, ("ann", "bob"))
    assert tables.cell(OVER_TEACHERS, "rank", LARGE).figures["macro_f1"] == pytest.approx((0.58, None, 1))


def test_the_table_has_all_lines_with_the_best_marked():
    tables = make_tables(two_seeds())
    header, (group,) = score_table(tables, "macro_f1")
    assert header == ["40 texts (4\u202f%)", "100 texts (10\u202f%)", "no budget"]
    rows = dict(group.rows)
    assert list(rows) == [
        RANDOM,
        "rank",
        "all pseudo-labels",
        "gold labels (upper bound)",
        "the teacher itself",
    ]
    assert [cell.text for cell in rows[RANDOM]] == ["–", "42.0 ± 25.4", ""]
    assert [cell.is_best for cell in rows["rank"]] == [False, True, False]
    assert [cell.is_best for cell in rows[RANDOM]] == [False, False, False]
    assert rows["all pseudo-labels"][-1].text == "50.0 ± 63.5"
    assert rows["gold labels (upper bound)"][-1].text == "–"
    assert rows["the teacher itself"][-1].text == "60.0"


def test_agreement_is_with_a_teacher():
    results = [*two_seeds("ann"), *two_seeds("bob", above=0.2), result("", GOLD, 0, POOL, 0.9)]
    tables = make_tables(results, ("ann", "bob"))
    _, groups = score_table(tables, "agreement")
    assert [group.teacher for group in groups] == ["ann", "bob", OVER_TEACHERS]
    rows = dict(groups[-1].rows)
    assert list(rows) == [RANDOM, "rank", "all pseudo-labels"], "gold has no teacher, whom a teacher is"
    assert [cell.text for cell in rows["rank"]] == ["–", "94.0 ± 50.8", ""]
    assert rows["rank"][1].is_best
    assert rows["all pseudo-labels"][-1].text == "90.0 ± 63.5"


def test_results_without_agreement_leave_it_out(tmp_path):
    """Those of an older version, alone and among others."""
    old = [replace(one, agreement=None) for one in two_seeds()]
    assert not make_tables(old).has("agreement")
    write_comparison(RunStore(str(tmp_path)), make_tables(old), old, settings="", missing=0, trials=1)
    assert "Agreement" not in (tmp_path / PAGE).read_text() + (tmp_path / MARKDOWN).read_text()
    assert not (tmp_path / f"{CURVES['agreement']}.svg").exists()
    mixed = [
        one if one.line == "rank" and one.seed == 1 else new
        for one, new in zip(old, two_seeds(), strict=True)
    ]
    tables = make_tables(mixed)
    rows = dict(score_table(tables, "agreement")[1][0].rows)
    assert rows["rank"][1].text == "–", "a mean over some of the seeds would not be set beside the others"
    assert rows[RANDOM][1].text == "72.0 ± 25.4"
    write_comparison(RunStore(str(tmp_path)), tables, mixed, settings="", missing=0, trials=1)
    assert "Agreement with the teacher" in (tmp_path / PAGE).read_text()


def test_differences_costs_and_classes_are_shown():
    tables = make_tables(two_seeds())
    header, (group,) = difference_table(tables, "macro_f1")
    shown = dict(zip(header, (cell.text for cell in dict(group.rows)["rank"]), strict=True))
    assert shown["100 texts (10\u202f%), over random"] == "+12.0 ± 25.4"
    assert shown["40 texts (4\u202f%), over random"] == "–"
    _, (group,) = cost_table(tables)
    texts = [cell.text for cell in dict(group.rows)["rank"]]
    assert texts == ["100 texts (10\u202f%)", "80", "8.0 %", "500", "12,000", "80.0 ± 0.0"]
    header, rows = class_table(tables, "ann")
    assert dict(zip(header, rows[0][1], strict=True)) == {
        RANDOM: pytest.approx(0.32),
        "rank": pytest.approx(0.44),
        "all pseudo-labels": pytest.approx(0.40),
        "gold labels (upper bound)": None,
        "the teacher itself": 0.5,
    }


def test_the_summary_has_a_row_a_cell_and_one_a_teacher():
    rows = summary_rows(make_tables(two_seeds()))
    by_line = {row["line"]: row for row in rows}
    assert len(rows) == len(by_line) == 4
    assert by_line["rank"]["macro_f1_over_random"] == pytest.approx(0.12)
    assert by_line[RANDOM]["macro_f1_over_random"] is None
    assert by_line["teacher"]["macro_f1"] == 0.6


def test_the_conclusion_names_the_best_line_and_admits_chance():
    said = conclusion(make_tables(two_seeds()))
    assert "rank has the highest macro-F1 with ann's labels: 54.0" in said
    assert "12.0 ± 25.4 points above random, which chance may explain" in said
    sure = [one if one.line != "rank" else result("ann", "rank", one.seed, LARGE, 0.9 + one.seed * 0.041)
            for one in two_seeds()]  # fmt: skip
    assert "points above random." in conclusion(make_tables(sure))
    assert "Too few" in conclusion(make_tables([]))


@pytest.mark.parametrize("n_results", [0, 1, None])
def test_all_files_are_written_however_few_trials_there_are(tmp_path: Path, n_results: int | None):
    results = two_seeds(ATTACK)[:n_results]
    tables = make_tables(results, (ATTACK,))
    store = RunStore(str(tmp_path))
    write_comparison(store, tables, results, settings="a: <b>", missing=3, trials=9)
    page = (tmp_path / PAGE).read_text()
    assert "3 of 9 trials are missing" in page
    assert "<script" not in page
    assert 'href="http' not in page
    assert 'src="' not in page
    text = (tmp_path / MARKDOWN).read_text()
    # A bar in a name does not make a column.
    table = text[text.index("## Macro-F1") :].split("\n\n")[1].splitlines()
    assert {row.replace("\\|", "").count("|") for row in table} == {6}
    for measure, curve in CURVES.items():
        if n_results is None or measure == "macro_f1":
            assert (tmp_path / f"{curve}.png").read_bytes().startswith(b"\x89PNG")
            assert "<svg" in (tmp_path / f"{curve}.svg").read_text()
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    if rows:
        assert float(rows[0]["f1 sea"]) == pytest.approx(0.35)


def without_column(content: str, name: str) -> str:
    rows = list(csv.reader(content.splitlines()))
    at = rows[0].index(name)
    return "\n".join(",".join([*row[:at], *row[at + 1 :]]) for row in rows)


def test_results_come_back_as_they_were_written(tmp_path):
    results = [*two_seeds(), result("", GOLD, 0, POOL, 1 / 3)]
    store = RunStore(str(tmp_path))
    write_comparison(store, make_tables(results), results, settings="", missing=0, trials=1)
    assert read_results(store.path(RESULTS), NAMES) == results
    (tmp_path / RESULTS).write_text(without_column((tmp_path / RESULTS).read_text(), "agreement"))
    assert read_results(store.path(RESULTS), NAMES) == [replace(one, agreement=None) for one in results]
    with pytest.raises(ConfigError, match=r"--add: .* has no column 'f1 sky'; give results\.csv of the same"):
        read_results(store.path(RESULTS), ("sea", "sky"))
    with pytest.raises(ConfigError, match=r"--add: .*nowhere\.csv' cannot be read: No such file"):
        read_results(tmp_path / "nowhere.csv", NAMES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1\xff\xfe", "cannot be read: it is no CSV file"),
        (b"teacher,line\nann,rank\n", "has no column 'seed'"),
        ("half a line", "has a broken line: ann,random,0,"),
        ("no number", "has a broken line: ann,random,0,many"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_in_one_line(tmp_path, content, said):
    store = RunStore(str(tmp_path))
    write_comparison(
        store,
        make_tables(two_seeds()),
        [result("ann", RANDOM, 0, SMALL, 0.5)],
        settings="",
        missing=0,
        trials=1,
    )
    header, line = (tmp_path / RESULTS).read_text().splitlines()
    if content == "half a line":
        content = f"{header}\n{line[:20]}\n".encode()
    elif content == "no number":
        content = f"{header}\n{line.replace(f',{SMALL},', ',many,', 1)}\n".encode()
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_results(tmp_path / RESULTS, NAMES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
