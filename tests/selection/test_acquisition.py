"""One contract for every acquisition policy, and what each of ours promises beyond it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import AcquisitionConfig
from llkd_ray.metrics.uncertainty import RowRandom
from llkd_ray.selection import table
from llkd_ray.selection.acquisition import ACQUISITION, find_acquisition
from llkd_ray.selection.table import Chunked, Unread

WITH_STUDENT = sorted(name for name, policy in ACQUISITION.items() if policy.uses_student)


def make_unread(n: int, seed: int = 0, scored: float = 1.0) -> Unread:
    rng = np.random.default_rng(seed)
    uncertainty, margin = rng.uniform(size=(2, n))
    unknown = rng.uniform(size=n) >= scored
    uncertainty[unknown] = margin[unknown] = np.nan
    row_N = np.sort(rng.choice(10 * n + 1, n, replace=False))
    return Unread(row_N, uncertainty.astype(np.float32), margin.astype(np.float16))


def choose(name: str, unread: Unread, n: int, seed: int = 0, explore: float = 0.0) -> np.ndarray:
    return ACQUISITION[name].choose(unread, n, np.random.default_rng(seed), seed=seed, explore=explore)


def places(unread: Unread, row_M: np.ndarray) -> np.ndarray:
    return np.searchsorted(unread.row_N, row_M)


def test_registry():
    assert set(ACQUISITION) == {"sequential", "random", "entropy", "margin", "m_raru"}
    assert WITH_STUDENT == ["entropy", "m_raru", "margin"]


@pytest.mark.parametrize("name", sorted(ACQUISITION))
@settings(max_examples=25, deadline=None)
@given(
    n_unread=st.integers(0, 200),
    n=st.integers(0, 250),
    seed=st.integers(0, 2**32),
    scored=st.sampled_from([0.0, 0.5, 1.0]),
    explore=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    chunk=st.integers(1, 60),
    borders=st.lists(st.integers(0, 200), max_size=4),
)
def test_contract(name, n_unread, n, seed, scored, explore, chunk, borders):
    """Size, order, no row twice; the same for a seed whatever the chunks; each text valued by itself."""
    unread = make_unread(n_unread, seed, scored)
    before = [column.copy() for column in vars(unread).values()]
    rows = choose(name, unread, n, seed, explore)
    assert rows.size == min(n, n_unread)
    assert (np.diff(rows) > 0).all(), "ascending, and none twice"
    assert np.isin(rows, unread.row_N).all()

    edges = [0, *sorted(min(border, n_unread) for border in borders), n_unread]
    chunked = Chunked(lambda: (unread.take(slice(*edge)) for edge in pairwise(edges)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK", chunk)
        for same in (unread, chunked):
            np.testing.assert_array_equal(choose(name, same, n, seed, explore), rows)

    rule, order = ACQUISITION[name].rule, np.random.default_rng(1).permutation(n_unread)
    value_N = rule(unread, seed, RowRandom(7))
    np.testing.assert_array_equal(rule(unread.take(order), seed, RowRandom(7)), value_N[order])
    for old, new in zip(before, vars(unread).values(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", sorted(set(ACQUISITION) - {"sequential"}))
def test_another_seed_reads_other_texts_where_nothing_is_known(name):
    unread = make_unread(200, scored=0.0)
    assert set(choose(name, unread, 50, seed=1)) != set(choose(name, unread, 50, seed=2))


@pytest.mark.parametrize("explore", [0.0, 1.0])
def test_sequential_reads_in_corpus_order_whatever_is_explored(explore):
    unread = make_unread(100)
    np.testing.assert_array_equal(choose("sequential", unread, 30, explore=explore), unread.row_N[:30])


def test_random_reads_all_parts_alike():
    unread = make_unread(1000)
    upper = [np.mean(places(unread, choose("random", unread, 100, seed)) >= 500) for seed in range(50)]
    # 5,000 draws: three standard errors are 0.021.
    assert np.mean(upper) == pytest.approx(0.5, abs=0.021)


def test_reads_where_the_student_is_unsure_or_two_labels_are_close():
    unread = make_unread(100)
    assert set(places(unread, choose("entropy", unread, 20))) == set(np.argsort(-unread.uncertainty_N)[:20])
    cutoff = np.sort(unread.margin_N)[19]  # float16 has ties
    assert (unread.margin_N[places(unread, choose("margin", unread, 20))] <= cutoff).all()


@pytest.mark.parametrize("name", ["entropy", "margin"])
def test_what_the_student_never_saw_comes_first(name):
    unread = make_unread(100, scored=0.8)
    unknown = np.flatnonzero(np.isnan(unread.uncertainty_N))
    assert 5 < unknown.size < 60
    assert set(unknown) <= set(places(unread, choose(name, unread, 60)))
    few = places(unread, choose(name, unread, 5, seed=1))
    assert set(few) <= set(unknown)
    assert set(few) != set(places(unread, choose(name, unread, 5, seed=2))), "among them, at random"


class TestExploration:
    @pytest.mark.parametrize("name", WITH_STUDENT)
    def test_a_share_is_drawn_at_random(self, name):
        unread = make_unread(2000)
        best = set(choose(name, unread, 200))
        for explore, expected in ((0.0, 0), (0.5, 100), (1.0, 200)):
            others = len(set(choose(name, unread, 200, explore=explore)) - best)
            # Of those drawn at random about a tenth would have been read anyway.
            assert 0.75 * expected <= others <= expected

    def test_explores_what_the_student_is_sure_of(self):
        unread = make_unread(2000)
        chosen = places(unread, choose("entropy", unread, 400, explore=0.5))
        assert (unread.uncertainty_N[chosen] < 0.5).sum() > 50
        without = places(unread, choose("entropy", unread, 400))
        assert (unread.uncertainty_N[without] < 0.5).sum() == 0


class TestMRaru:
    def value(self, unread, seed=5):
        return ACQUISITION["m_raru"].rule(unread, seed, RowRandom(99))

    def test_nothing_is_drawn(self):
        unread = make_unread(50)
        one, other = (ACQUISITION["m_raru"].rule(unread, 5, RowRandom(s)) for s in (1, 2))
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(self.value(unread, seed=6), one), "the run's seed counts"

    @pytest.mark.parametrize("uncertainty", [0.1, 0.5, 0.9])
    def test_a_text_is_accepted_as_often_as_it_is_uncertain(self, uncertainty):
        n = 20_000
        unread = Unread(np.arange(n), np.full(n, uncertainty), np.zeros(n))
        # Three standard errors of a share of 20,000 are 0.011 at most.
        assert np.mean(self.value(unread) > 0) == pytest.approx(uncertainty, abs=0.011)

    def test_accepted_come_before_rejected(self):
        unread = make_unread(300)
        accepted = set(np.flatnonzero(self.value(unread) > 0))
        few, many = (set(places(unread, choose("m_raru", unread, n, seed=5))) for n in (20, 250))
        assert few < accepted < many

    def test_never_scored_is_always_accepted(self):
        unread = make_unread(300, scored=0.5)
        assert (self.value(unread)[np.isnan(unread.uncertainty_N)] > 0).all()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match=r"acquisition\.policy: 'margins' .* m_raru"):
        find_acquisition(AcquisitionConfig(policy="margins"))
