from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.signals import entropy
from llkd_ray.table import ScoreTable, Unread


@pytest.fixture
def table() -> ScoreTable:
    """Ten pool rows, two test rows; tickets 0 and 1 hold rows 0-3 and 4-7; row 7 is held out."""
    table = ScoreTable(n_classes=3, n_pool=10, n_test=2)
    table.hold_out(np.array([7]))
    table.lease(0, np.arange(0, 4))
    table.lease(1, np.arange(4, 8))
    return table


def label(table: ScoreTable, rows: list[int], labels: list[int]) -> int:
    return table.put_labels(np.array(rows), np.array(labels), np.full(len(rows), 0.5), np.zeros(len(rows)))


def p_of(*top: float) -> np.ndarray:
    """Answers over three classes, each with a share of ``top`` on class 0 and the rest spread evenly."""
    return np.array([[t, (1 - t) / 2, (1 - t) / 2] for t in top])


def test_twenty_four_bytes_a_row(table):
    assert table.nbytes == 24 * len(table)


def test_unread_are_pool_rows_without_a_ticket(table):
    table.refresh(1, np.array([9]), p_of(0.6))
    unread = table.unread()
    assert isinstance(unread, Unread)
    assert unread.row_N.tolist() == [8, 9]
    np.testing.assert_allclose(unread.margin_N, [np.nan, 0.4], atol=1e-3)
    np.testing.assert_allclose(unread.uncertainty_N, [np.nan, entropy(p_of(0.6))[0]], rtol=1e-6)
    assert unread.take(np.array([1])).row_N.tolist() == [9]


def test_a_label_stays_when_it_comes_twice(table):
    assert label(table, [0, 1], [2, 1]) == 2
    assert label(table, [1, 2], [0, 0]) == 1
    assert table.label[:3].tolist() == [2, 1, 0]


def test_candidates_are_labelled_untrained_and_not_held_out(table):
    label(table, [0, 1, 4, 7, 10], [0, 1, 2, 0, 0])
    table.mark_trained(0, np.array([1]))
    assert table.candidates(tickets_below=2).row_N.tolist() == [0, 4]
    assert table.candidates(tickets_below=1).row_N.tolist() == [0]


def test_counts(table):
    label(table, [0, 7, 10], [0, 1, 2])
    table.mark_trained(0, np.array([0]))
    table.mark_trained(1, np.array([0]))
    assert table.count_labelled() == 2, "test rows are not counted as pool labels"
    assert table.count_trained() == 1
    assert table.trained[0] == 0, "the first round stays"


def test_refresh_notes_entropy_margin_and_support_of_the_teachers_label(table):
    label(table, [0, 1], [0, 2])
    p = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    table.refresh(1, np.array([0, 1, 2]), p)
    np.testing.assert_allclose(table.uncertainty[:3], entropy(p), rtol=1e-6)
    np.testing.assert_allclose(table.margin[:3], [0.5, 0.5, 1.0], atol=1e-3)
    # Row 2 has no label that the student could support.
    np.testing.assert_allclose(table.support[:3], [0.7, 0.1, np.nan], atol=1e-3)
    assert np.isnan(table.uncertainty[3:]).all(), "other rows are left alone"


def test_support_is_noted_once_the_label_is_there_and_the_student_is_heard_again(table):
    for round_number in (1, 1):
        table.refresh(round_number, np.array([0]), p_of(0.8))
        label(table, [0], [1])
    assert table.support[0] == pytest.approx(0.1, abs=1e-3)


def test_refresh_of_an_older_round_changes_nothing(table):
    table.refresh(3, np.array([0, 1]), p_of(0.3, 0.3))
    table.refresh(2, np.array([1, 2]), p_of(0.2, 0.2))
    np.testing.assert_allclose(table.uncertainty[:3], entropy(p_of(0.3, 0.3, 0.2)), rtol=1e-6)
    assert table.refreshed[:3].tolist() == [3, 3, 2]


def test_scores_come_back_as_they_were(table):
    label(table, [0, 1], [0, 1])
    table.refresh(1, np.array([0, 1, 8]), p_of(0.3, 0.4, 0.5))
    table.refresh(2, np.array([8]), p_of(0.9))
    rows, *columns = table.scores(1)
    assert rows.tolist() == [0, 1]
    other = ScoreTable(n_classes=3, n_pool=10, n_test=2)
    for round_number in (1, 2):
        other.restore_scores(round_number, *table.scores(round_number))
    for column in ("uncertainty", "margin", "support", "refreshed"):
        one, restored = getattr(table, column), getattr(other, column)
        assert one.dtype == restored.dtype
        np.testing.assert_array_equal(one, restored, err_msg=column)
    assert [column.size for column in columns] == [2, 2, 2]


def test_candidates_carry_every_column(table):
    label(table, [0, 1], [2, 1])
    table.refresh(1, np.array([1]), np.array([[0.1, 0.6, 0.3]]))
    candidates = table.candidates(tickets_below=2)
    assert candidates.label_N.tolist() == [2, 1]
    assert candidates.confidence_N.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(candidates.margin_N, [np.nan, 0.3], atol=1e-3)
    np.testing.assert_allclose(candidates.support_N, [np.nan, 0.6], atol=1e-3)
    assert candidates.n_classes == 3
    turned = candidates.take(np.array([1, 0]))
    assert turned.row_N.tolist() == [1, 0]
    assert turned.label_N.tolist() == [1, 2]
    np.testing.assert_allclose(turned.margin_N, [0.3, np.nan], atol=1e-3)
    np.testing.assert_array_equal(turned.by_row().support_N, candidates.support_N)


def test_labelled_of_class_counts_the_pool_below_a_ticket(table):
    table.lease(0, np.array([0, 1, 2]))
    table.lease(3, np.array([3]))
    table.put_labels(np.array([0, 1, 3]), np.array([2, 2, 0]), np.ones(3), np.zeros(3))
    assert table.labelled_of_class(1).tolist() == [0, 0, 2]
    assert table.labelled_of_class(4).tolist() == [1, 0, 2]


def test_trained_of_class_counts_pseudo_labels(table):
    assert table.trained_of_class().tolist() == [0, 0, 0]
    label(table, [0, 1, 2, 3], [2, 2, 0, 1])
    table.mark_trained(0, np.array([0, 1, 2]))
    assert table.trained_of_class().tolist() == [1, 0, 2]


def test_untrained_leaves_out_test_holdout_and_trained(table):
    table.mark_trained(0, np.array([2, 3]))
    assert table.untrained().tolist() == [0, 1, 4, 5, 6, 8, 9]
