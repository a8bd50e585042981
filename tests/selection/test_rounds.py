"""A round's selection from the table, where the student looks at all of it and where at a share."""

from __future__ import annotations

import numpy as np
import pytest
from candidate_sets import refresh
from toys import make_config

from llkd_ray.selection.acquisition import find_acquisition
from llkd_ray.selection.policies import SELECTION, find_selection
from llkd_ray.selection.rounds import SAMPLE_SIZE, RoundSelection, sample_candidates
from llkd_ray.selection.table import NONE, ScoreTable
from llkd_ray.storage import tables

N, N_CLASSES = 3_000, 3
USING_STUDENT = sorted(name for name, policy in SELECTION.items() if policy.uses_student)


def a_table(seed: int = 0) -> ScoreTable:
    """Labels for all but the last tenth of the rows."""
    rng = np.random.default_rng(seed)
    table = ScoreTable(N_CLASSES, N)
    row_M = np.arange(int(0.9 * N))
    table.lease(0, row_M)
    label_M, confidence_M = rng.integers(0, N_CLASSES, row_M.size), rng.uniform(0.34, 1, row_M.size)
    table.put_labels(row_M, label_M, confidence_M, np.zeros_like(row_M))
    return table


def opinion(round_number: int) -> np.ndarray:
    """float[N, C]: what the student thinks of every row before a round; a little else every time."""
    rng, other = np.random.default_rng(7), np.random.default_rng(round_number)
    p_NC = rng.dirichlet(np.full(N_CLASSES, 0.7), N) + 0.05 * other.random((N, N_CLASSES))
    return p_NC / p_NC.sum(axis=1, keepdims=True)


def of_round(table: ScoreTable, k: int, share: float, policy: str = "llkd_sample", **more) -> RoundSelection:
    settings = {"policy": policy, "refresh_share": share} | more.pop("selection", {})
    config = make_config(selection=settings, **more)
    policy, acquisition = find_selection(config.selection), find_acquisition(config.acquisition)
    return RoundSelection(config, policy, acquisition, table, k, tickets_below=1)


def score(table: ScoreTable, selection: RoundSelection) -> np.ndarray:
    row_M = selection.to_score()
    refresh(table, selection.round_number, row_M, opinion(selection.round_number)[row_M])
    return row_M


class TestToScore:
    @pytest.mark.parametrize(("policy", "n"), [("random", 0.9 * N), ("entropy", N)])
    def test_everything_is_all_candidates_and_where_acquisition_asks_what_is_unread(self, policy, n):
        selection = of_round(a_table(), 1, 1.0, acquisition={"policy": policy})
        assert np.array_equal(selection.to_score(), np.arange(n))

    @pytest.mark.parametrize("policy", USING_STUDENT)
    def test_a_share_is_no_more_than_that(self, policy):
        table = a_table()
        for k in (1, 2):
            row_M = score(table, of_round(table, k, 0.1, policy))
            assert 0 < row_M.size <= 0.09 * N
            assert np.array_equal(row_M, np.unique(row_M))
            assert (table.label[row_M] != NONE).all()
            same = [of_round(table, k + 1, 0.1, policy).to_score() for _ in range(2)]
            assert np.array_equal(*same), "whoever asks"

    def test_a_share_of_the_pool_is_one_of_what_is_unread_too(self):
        selection = of_round(a_table(), 1, 0.1, acquisition={"policy": "entropy"})
        row_M = selection.to_score()
        assert np.count_nonzero(row_M >= 0.9 * N) == 0.01 * N
        assert row_M.size == 0.1 * N

    def test_what_was_not_looked_at_for_long_comes_back(self):
        """Nothing is trained on here, and the teacher's confidence does not count: only age and doubt do."""
        table = a_table()
        seen = {row for k in range(1, 12) for row in score(table, of_round(table, k, 0.25, "entropy"))}
        assert len(seen) == int(0.9 * N)

    def test_texts_nobody_has_looked_at_are_drawn_from_all_over(self):
        row_M = of_round(a_table(), 1, 0.1, "entropy").to_score()
        assert 0.35 * N < row_M.mean() < 0.55 * N, "the middle of the labelled rows is 0.45 N"


class TestChoose:
    @pytest.mark.parametrize("policy", USING_STUDENT)
    def test_nothing_unlooked_at_is_chosen_while_there_is_enough(self, policy):
        table = a_table()
        for k in (1, 2, 3):
            selection = of_round(table, k, 0.2, policy)
            score(table, selection)
            chosen = selection.choose(40)
            assert len(chosen) > 0
            assert selection.staleness(chosen.row_M)["never_scored"] == 0
            table.mark_trained(k, chosen.row_M)

    def test_more_than_was_looked_at_is_filled_up_with_what_was_not(self):
        table = a_table()
        selection = of_round(table, 1, 0.01)
        n_scored = score(table, selection).size
        chosen = selection.choose(100)
        assert len(chosen) == 100 > n_scored
        assert selection.staleness(chosen.row_M)["never_scored"] >= 100 - n_scored

    def test_a_draw_finds_much_of_what_it_finds_when_all_is_looked_at(self):
        """Any tenth would find a tenth of it: the one that is looked at is what may come to be drawn."""
        found = {}
        for share in (1.0, 0.1):
            table = a_table()
            selection = of_round(table, 1, share)
            score(table, selection)
            found[share] = set(selection.choose(60).row_M.tolist())
        assert len(found[1.0] & found[0.1]) > 0.4 * 60

    def test_staleness_counts_rounds(self):
        table = a_table()
        refresh(table, 1, np.arange(10), opinion(1)[:10])
        refresh(table, 3, np.arange(10, 20), opinion(3)[10:20])
        selection = of_round(table, 4, 0.5)
        assert selection.staleness(np.arange(20)) == {"mean_age": 2.0, "never_scored": 0}
        assert selection.staleness(np.arange(15, 25)) == {"mean_age": 1.0, "never_scored": 5}
        assert selection.staleness(np.arange(20, 25)) == {"mean_age": None, "never_scored": 5}


def table_of(n: int, rng: np.random.Generator) -> ScoreTable:
    """A pool of which all rows but every third are labelled and scored."""
    table = ScoreTable(3, n)
    row_M = np.flatnonzero(np.arange(n) % 3)
    table.lease(0, row_M)
    table.put_labels(row_M, rng.integers(0, 3, row_M.size), rng.random(row_M.size), np.zeros(row_M.size))
    refresh(table, 1, row_M, rng.dirichlet(np.ones(3), row_M.size))
    return table


@pytest.mark.parametrize("n", [30, 3_000, 90_000])
def test_a_sample_is_small_whatever_the_pool(n):
    rng = np.random.default_rng(0)
    table = table_of(n, rng)
    candidates = len(table.candidates(1))
    chosen_M = rng.permutation(table.candidates(1).row_N)[: n // 2]
    candidate_sample = sample_candidates(table, 1, candidates, chosen_M)
    assert candidate_sample.schema == tables.CANDIDATE_SAMPLE
    selected_N, row_N = candidate_sample["selected"].to_numpy(), candidate_sample["row"].to_numpy()
    assert selected_N.sum() == min(SAMPLE_SIZE, chosen_M.size)
    assert (~selected_N).sum() <= 2 * SAMPLE_SIZE
    assert set(row_N[selected_N]) <= set(chosen_M)
    assert not set(row_N[~selected_N]) & set(chosen_M)
    assert np.unique(row_N).size == row_N.size
    np.testing.assert_array_equal(candidate_sample["label"].to_numpy(), table.label[row_N])
    np.testing.assert_allclose(candidate_sample["confidence"].to_numpy(), table.confidence[row_N])


def test_nothing_may_be_chosen_or_all():
    table = table_of(30, np.random.default_rng(1))
    every = table.candidates(1).row_N
    assert sample_candidates(table, 1, every.size, every)["selected"].to_numpy().all()
    assert not sample_candidates(table, 1, every.size, every[:0])["selected"].to_numpy().any()
    assert len(sample_candidates(ScoreTable(3, 30), 1, 0, every[:0])) == 0
