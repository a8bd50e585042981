"""A look at what a round could choose from is small, and tells the chosen from the others."""

from __future__ import annotations

import numpy as np
import pytest
from candidate_sets import refresh

from llkd_ray.selection.rounds import AT_MOST, sample_candidates
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage import tables


def table_of(n: int, rng: np.random.Generator) -> ScoreTable:
    """A pool of which all rows but every third are labelled and scored."""
    table = ScoreTable(3, n)
    row_M = np.flatnonzero(np.arange(n) % 3)
    table.lease(0, row_M)
    table.put_labels(row_M, rng.integers(0, 3, row_M.size), rng.random(row_M.size), np.zeros(row_M.size))
    refresh(table, 1, row_M, rng.dirichlet(np.ones(3), row_M.size))
    return table


@pytest.mark.parametrize("n", [30, 3_000, 90_000])
def test_a_glance_is_small_whatever_the_pool(n):
    rng = np.random.default_rng(0)
    table = table_of(n, rng)
    candidates = len(table.candidates(1))
    chosen_M = rng.permutation(table.candidates(1).row_N)[: n // 2]
    candidate_sample = sample_candidates(table, 1, candidates, chosen_M)
    assert candidate_sample.schema == tables.CANDIDATE_SAMPLE
    selected_N, row_N = candidate_sample["selected"].to_numpy(), candidate_sample["row"].to_numpy()
    assert selected_N.sum() == min(AT_MOST, chosen_M.size)
    assert (~selected_N).sum() <= 2 * AT_MOST
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
