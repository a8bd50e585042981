from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from candidate_sets import refresh
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.metrics.uncertainty import StudentScores, entropy
from llkd_ray.selection import table as table_module
from llkd_ray.selection.table import (
    COLUMNS,
    UNIT,
    ScoreTable,
    Unread,
    class_sums,
    from_16_bits,
    slices,
    to_16_bits,
)

STEP = 1 / 65_534
"""Between two uncertainties that the table tells apart."""


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


def uncertainty(table: ScoreTable, *rows: int) -> np.ndarray:
    return from_16_bits(table.uncertainty[list(rows)])


def test_twenty_bytes_a_row_at_most(table):
    columns = [value for value in vars(table).values() if isinstance(value, np.ndarray)]
    per_row = [column for column in columns if column.size == len(table)]
    assert table.nbytes == sum(column.nbytes for column in per_row) <= 20 * len(table)
    assert sum(column.nbytes for column in columns) - table.nbytes <= 8 * table.n_classes


def test_unread_are_pool_rows_without_a_ticket(table):
    refresh(table, 1, np.array([9]), p_of(0.6))
    unread = table.unread()
    assert isinstance(unread, Unread)
    assert unread.row_N.tolist() == [8, 9]
    np.testing.assert_allclose(unread.margin_N, [np.nan, 0.4], atol=1e-3)
    np.testing.assert_allclose(unread.uncertainty_N, [np.nan, entropy(p_of(0.6))[0]], atol=STEP)
    assert unread.take(np.array([1])).row_N.tolist() == [9]


def test_what_is_asked_of_a_table_after_some_updates(table):
    assert label(table, [0, 1, 4, 7, 10], [2, 1, 2, 0, 0]) == 5
    assert label(table, [1, 2], [0, 0]) == 1, "the first label stays"
    assert table.label[:3].tolist() == [2, 1, 0]
    for round_number in (0, 1):
        table.mark_trained(round_number, np.array([1, 7]))  # row 7 is held out
    assert table.trained[1] == 0, "the first round stays"
    assert (table.count_labelled(), table.count_trained()) == (5, 1), "a test row is none of the pool"
    assert table.held_out().tolist() == [7]
    assert table.untrained().tolist() == [0, 2, 3, 4, 5, 6, 8, 9]
    assert table.candidates(tickets_below=2).row_N.tolist() == [0, 2, 4]
    assert table.candidates(tickets_below=1).row_N.tolist() == [0, 2]
    assert table.labelled_of_class(1).tolist() == [1, 1, 1]
    assert table.labelled_of_class(2).tolist() == [2, 1, 2]


def test_refresh_notes_entropy_margin_and_support_of_the_teachers_label(table):
    label(table, [0, 1], [0, 2])
    p = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    refresh(table, 1, np.array([0, 1, 2]), p)
    np.testing.assert_allclose(uncertainty(table, 0, 1, 2), entropy(p), atol=STEP)
    np.testing.assert_allclose(table.margin[:3], [0.5, 0.5, 1.0], atol=1e-3)
    # Row 2 has no label that the student could support.
    np.testing.assert_allclose(table.support[:3], [0.7, 0.1, np.nan], atol=1e-3)
    assert np.isnan(uncertainty(table, *range(3, 12))).all(), "other rows are left alone"


def test_support_of_a_label_that_has_changed_is_unknown(table):
    label(table, [0, 1], [0, 0])
    rows = np.array([0, 1, 2])
    scores = StudentScores.of(p_of(0.8, 0.8, 0.8), table.label[rows])
    table.relabel(np.array([1]), np.array([2]), np.array([0.9]), np.array([1]))
    label(table, [2], [0])
    table.refresh(1, rows, scores)
    np.testing.assert_allclose(table.support[rows], [0.8, np.nan, np.nan], atol=1e-3)
    assert not np.isnan(uncertainty(table, 0, 1, 2)).any()


def test_refresh_of_an_older_round_changes_nothing(table):
    refresh(table, 3, np.array([0, 1]), p_of(0.3, 0.3))
    refresh(table, 2, np.array([1, 2]), p_of(0.2, 0.2))
    np.testing.assert_allclose(uncertainty(table, 0, 1, 2), entropy(p_of(0.3, 0.3, 0.2)), atol=STEP)
    assert table.refreshed[:3].tolist() == [3, 3, 2]


def test_candidates_carry_every_column(table):
    label(table, [0, 1], [2, 1])
    refresh(table, 1, np.array([1]), np.array([[0.1, 0.6, 0.3]]))
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


def test_the_last_round_label_and_ticket_there_can_be():
    table = ScoreTable(n_classes=32_767, n_pool=2)
    table.lease(2**31 - 1, np.array([0]))
    label(table, [0], [32_766])
    refresh(table, 32_767, np.array([0]), np.full((1, 32_767), 1 / 32_767))
    table.mark_trained(32_767, np.array([0]))
    assert (table.ticket[0], table.label[0]) == (2**31 - 1, 32_766)
    assert (table.refreshed[0], table.trained[0]) == (32_767, 32_767)
    assert table.scores(32_767)[0].tolist() == [0]
    assert table.trained_of_class()[32_766] == 1


def test_contradicted_are_the_largest_leads_of_labels_of_the_first_teacher(table):
    """Rows 0 to 3 are what it calls 0, and the student does not."""
    label(table, [0, 1, 2, 3], [0, 0, 0, 0])
    student = np.array([[0.1, 0.9, 0.0], [0.05, 0.95, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    refresh(table, 1, np.arange(4), student)
    for lead, limit, rows in ((0.5, 9, [0, 1, 3]), (0.5, 2, [0, 1]), (0.85, 9, [1])):
        assert table.contradicted(lead, limit).tolist() == rows
    better = np.array([0])
    assert table.relabel(better, np.array([0]), np.array([0.9]), np.array([1])) == 0
    refresh(table, 2, better, student[better])
    assert table.contradicted(0.5, limit=9).tolist() == [1, 3]
    assert table.candidates(9).confidence_N[0] == pytest.approx(0.9), "it has no sign there"
    table.mark_trained(0, np.array([1]))
    assert table.contradicted(0.5, limit=9).tolist() == [3]


def fill(table: ScoreTable, seed: int) -> None:
    """A run's worth of updates, in an order that a run need not have."""
    rng = np.random.default_rng(seed)

    def some() -> np.ndarray:
        return np.flatnonzero(rng.uniform(size=len(table)) < 0.6)

    table.hold_out(np.flatnonzero(rng.uniform(size=table.n_pool) < 0.1))
    for k in range(3):
        rows = some()
        table.lease(k, rows[table.ticket[rows] < 0])
        for put in (table.put_labels, table.relabel):
            rows = some() if put == table.put_labels else np.flatnonzero(table.label >= 0)[::3]
            labels, members = rng.integers(0, table.n_classes, rows.size), rng.integers(0, 2, rows.size)
            put(rows, labels, rng.uniform(0.3, 1, rows.size), members)
        rows = some()
        refresh(table, k, rows, rng.dirichlet(np.ones(table.n_classes), rows.size))
        table.mark_trained(k, some()[::4])


@given(n_pool=st.integers(0, 60), n_test=st.integers(0, 20), seed=st.integers(0, 999))
def test_counts_that_are_kept_are_those_of_the_columns(n_pool, n_test, seed):
    table = ScoreTable(3, n_pool, n_test)
    fill(table, seed)
    is_trained = table.trained >= 0
    assert table.count_labelled() == np.count_nonzero(table.label[:n_pool] >= 0)
    assert table.count_trained() == np.count_nonzero(is_trained)
    labels = table.label[is_trained & (table.label >= 0)]
    assert table.trained_of_class().tolist() == np.bincount(labels, minlength=3).tolist()


@pytest.mark.parametrize("n_pool", [0, 7, 65])
def test_chunks_do_not_matter(n_pool, monkeypatch):
    tables = {}
    for chunk in (7, 1_000):
        monkeypatch.setattr(table_module, "CHUNK", chunk)
        tables[chunk] = table = ScoreTable(3, n_pool, 5)
        fill(table, 0)
        found = table.candidates(2), table.unread()
        parts = list(table.candidate_chunks(2)), list(table.unread_chunks())
        for whole, several in zip(found, parts, strict=True):
            assert len(several) == max(1, -(-n_pool // chunk))
            for name in set(vars(whole)) - {"n_classes"}:
                joined = np.concatenate([getattr(part, name) for part in several])
                np.testing.assert_array_equal(joined, getattr(whole, name))
    one, other = (
        [
            *(table.untrained(), table.held_out(), table.contradicted(0.5, 9), table.labelled_of_class(2)),
            *(table.scores(1)[0], *vars(table.scores(1)[1]).values()),
            *(table.candidates(2).row_N, table.unread().row_N),
        ]
        for table in tables.values()
    )
    for of_small, of_large in zip(one, other, strict=True):
        np.testing.assert_array_equal(of_small, of_large)


def test_nothing_but_the_answer_is_as_long_as_the_table():
    n, few = 2_000_000, 8 * 2**20
    table = ScoreTable(4, n)
    table.lease(0, np.arange(0, n, 2))
    table.put_labels(np.arange(0, n, 4), np.arange(n // 4) % 4, np.full(n // 4, 0.5), np.zeros(n // 4))
    for ask, limit in (
        (lambda: len(table.candidate_chunks(1)), few),
        (lambda: len(table.unread_chunks()), few),
        (lambda: table.labelled_of_class(1), few),
        (table.held_out, few),
        (lambda: table.contradicted(0.5, 10), few),
        (table.untrained, 8 * n + few),
        (lambda: table.scores(0), few),
    ):
        tracemalloc.start()
        try:
            ask()
            assert tracemalloc.get_traced_memory()[1] < limit
        finally:
            tracemalloc.stop()


def copy_of(table: ScoreTable) -> dict[str, np.ndarray]:
    """All columns as they are now."""
    columns: dict[str, np.ndarray] = {}
    for _ in table.copy_into(columns):
        pass
    return columns


class TestSnapshot:
    @pytest.fixture
    def filled(self) -> ScoreTable:
        table = ScoreTable(3, 50, 5)
        fill(table, 1)
        return table

    def test_comes_back_whole_and_goes_on(self, filled):
        other = ScoreTable(3, 50, 5)
        other.restore(copy_of(filled))
        for table in (filled, other):
            open_rows = table.untrained()[:3]
            table.put_labels(open_rows, np.array([2, 2, 2]), np.full(3, 0.9), np.zeros(3))
            table.mark_trained(5, open_rows)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(other, name), getattr(filled, name), err_msg=name)
            assert getattr(other, name).flags.writeable
        assert other.count_labelled() == filled.count_labelled()
        assert other.count_trained() == filled.count_trained()
        assert other.trained_of_class().tolist() == filled.trained_of_class().tolist()

    def test_what_is_noted_between_its_steps_can_be_noted_again_on_top(self, monkeypatch):
        monkeypatch.setattr(table_module, "_ROWS_A_STEP", 10)
        table, restored = ScoreTable(3, 45), ScoreTable(3, 45)

        def update(to: ScoreTable, k: int) -> None:
            rows = np.arange(k, 45, 3)
            to.lease(k, rows)
            label(to, rows.tolist(), [k] * rows.size)
            refresh(to, k, rows, np.tile(p_of(0.2 + 0.1 * k), (rows.size, 1)))
            to.mark_trained(k, rows[::2])

        columns: dict[str, np.ndarray] = {}
        for step, _ in enumerate(table.copy_into(columns)):
            if step < 3:
                update(table, step)
        assert step == 4
        assert 0 < np.count_nonzero(columns["label"] >= 0) < 45, "some of the updates are in it"
        restored.restore(columns)
        for k in range(3):
            update(restored, k)
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(restored, name), getattr(table, name), err_msg=name)
        assert restored.trained_of_class().tolist() == table.trained_of_class().tolist()

    @pytest.mark.parametrize(
        ("name", "column", "message"),
        [
            ("ticket", None, "snapshot column ticket is missing"),
            (
                "label",
                np.zeros(3, dtype=np.int16),
                r"int16\[3\], the table's is int16\[55\]: leave",
            ),
            ("trained", np.zeros(55, dtype=np.int64), r"snapshot column trained is int64\[55\]"),
        ],
    )
    def test_of_another_table_is_refused_and_changes_nothing(self, filled, name, column, message):
        columns, before = copy_of(filled) | {name: column}, filled.label.copy()
        with pytest.raises(ValueError, match=message):
            filled.restore(columns)
        np.testing.assert_array_equal(filled.label, before)


@given(n=st.integers(0, 200), chunk=st.integers(1, 50))
def test_slices_cover_every_row_once_and_in_order(n, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "CHUNK", chunk)
        parts = list(slices(n))
    assert np.concatenate([np.arange(n)[part] for part in parts]).tolist() == list(range(n))
    assert all(0 < part.stop - part.start <= chunk for part in parts) or parts == [slice(0, 0)]


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_share_comes_back_to_half_a_step(shares):
    back = from_16_bits(to_16_bits(np.array(shares)))
    assert back.dtype == np.float32
    # The second term is what float32 adds.
    np.testing.assert_allclose(back, shares, atol=1 / 131_068 + 2**-24, rtol=0)


def test_every_code_comes_back_and_the_ends_and_unknown_are_exact():
    codes = np.arange(65_536, dtype=np.uint16)
    np.testing.assert_array_equal(to_16_bits(from_16_bits(codes)), codes)
    with np.errstate(all="raise"):
        back = from_16_bits(to_16_bits(np.array([np.nan, 0.0, 1.0])))
    np.testing.assert_array_equal(back, [np.nan, 0.0, 1.0])


@given(
    texts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2)), max_size=40),
    order=st.randoms(use_true_random=False),
    border=st.integers(0, 40),
)
def test_sums_do_not_depend_on_order_or_parts(texts, order, border):
    def of(some):
        signal, label = np.array([s for s, _ in some]), np.array([c for _, c in some], dtype=np.int16)
        return class_sums(signal, label, 3)

    whole = of(texts)
    np.testing.assert_array_equal(of(texts[:border]) + of(texts[border:]), whole)
    order.shuffle(texts)
    np.testing.assert_array_equal(of(texts), whole)


def test_sums_of_several_chunks(monkeypatch):
    monkeypatch.setattr(table_module, "CHUNK", 10)
    rng = np.random.default_rng(0)
    signal, label = rng.uniform(0.01, 1, 95).astype(np.float32), rng.integers(0, 3, 95)
    # Such a float32 is a whole number of units, so its sum is exact.
    exact = [int(sum(int(s / UNIT) for s in signal[label == c].tolist())) for c in range(3)]
    assert class_sums(signal, label, 3).tolist() == exact


def test_the_largest_chunk_is_added_up_exactly():
    ones = np.ones(table_module.CHUNK)
    ones[0] = UNIT
    total = class_sums(ones, np.zeros(ones.size, dtype=np.int16), 1)
    assert total.tolist() == [(table_module.CHUNK - 1) * 2**32 + 1]
