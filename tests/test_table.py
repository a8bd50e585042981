from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.table import ScoreTable


@pytest.fixture
def table() -> ScoreTable:
    """Ten pool rows, two test rows; tickets 0 and 1 hold rows 0-3 and 4-7; row 7 is held out."""
    table = ScoreTable(n_classes=3, n_pool=10, n_test=2)
    table.hold_out(np.array([7]))
    table.lease(0, np.arange(0, 4))
    table.lease(1, np.arange(4, 8))
    return table


def label(table: ScoreTable, rows: list[int], labels: list[int]) -> int:
    return table.put_labels(np.array(rows), np.array(labels), np.full(len(rows), 0.5))


def test_twenty_bytes_a_row_at_most(table):
    assert table.nbytes <= 20 * len(table)


def test_unread_are_pool_rows_without_a_ticket(table):
    assert table.unread().tolist() == [8, 9]


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


def test_refresh_of_an_older_round_changes_nothing(table):
    table.refresh(3, np.array([0, 1]), np.array([0.3, 0.3]))
    table.refresh(2, np.array([1, 2]), np.array([0.2, 0.2]))
    np.testing.assert_allclose(table.uncertainty[:3], [0.3, 0.3, 0.2])
    assert table.refreshed[:3].tolist() == [3, 3, 2]


def test_untrained_leaves_out_test_holdout_and_trained(table):
    table.mark_trained(0, np.array([2, 3]))
    assert table.untrained().tolist() == [0, 1, 4, 5, 6, 8, 9]
