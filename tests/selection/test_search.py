"""What is counted of candidates, and the best of them, come out the same however the texts are divided."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from candidate_sets import make_candidates
from hypothesis import example, given
from hypothesis import strategies as st

from llkd_ray.metrics.uncertainty import RowRandom
from llkd_ray.selection import search
from llkd_ray.selection.search import NEVER, Pool, PoolStats, TopK, best
from llkd_ray.selection.table import UNIT


def divided(n: int, borders: list[int]) -> list[slice]:
    """``range(n)`` between borders, which may coincide."""
    edges = sorted([0, n, *(min(border, n) for border in borders)])
    return [slice(one, other) for one, other in pairwise(edges)]


class TestPoolStats:
    def test_counts_and_sums(self):
        candidates = make_candidates(500, scored=0.5)
        stats = PoolStats.of([candidates], with_ranks=True)
        known = np.nan_to_num(candidates.uncertainty_N, nan=1.0)
        counts = np.bincount(candidates.label_N)
        np.testing.assert_array_equal(stats.count_C, counts)
        for sums, signal in ((stats.confidence_C, candidates.confidence_N), (stats.uncertainty_C, known)):
            np.testing.assert_allclose(
                sums * UNIT, np.bincount(candidates.label_N, weights=signal), rtol=1e-9
            )
        assert stats.n_scored == np.count_nonzero(~np.isnan(candidates.uncertainty_N))
        np.testing.assert_array_equal(stats.grade_CK.sum(axis=1), counts)

    def test_of_no_candidates(self):
        stats = PoolStats.of([make_candidates(0)], with_ranks=False)
        assert stats.count_C.tolist() == [0, 0, 0, 0]
        assert stats.grade_CK is None
        assert Pool(stats, RowRandom(0)).means == (0.0, 0.0)

    @given(
        n=st.integers(0, 80),
        seed=st.integers(0, 99),
        borders=st.lists(st.integers(0, 80), max_size=4),
        order=st.randoms(use_true_random=False),
    )
    def test_chunks_add_up_in_any_order(self, n, seed, borders, order):
        candidates = make_candidates(n, seed, scored=0.7)
        whole = PoolStats.of([candidates], with_ranks=True)
        parts = [candidates.take(part) for part in divided(n, borders)]
        order.shuffle(parts)
        together = PoolStats.of(parts, with_ranks=True)
        for name, expected in vars(whole).items():
            np.testing.assert_array_equal(getattr(together, name), expected, err_msg=name)

    def test_many_classes_are_counted_in_coarser_grades(self):
        assert PoolStats.empty(341, with_ranks=True).grade_CK.shape == (341, 49_153)
        assert PoolStats.empty(342, with_ranks=True).grade_CK.shape == (342, 24_577)
        candidates = make_candidates(3_000, n_classes=1_000)
        rank = Pool(PoolStats.of([candidates], with_ranks=True), RowRandom(0)).rank(candidates)
        for c in range(10):
            of_class = np.flatnonzero(candidates.label_N == c)
            by_confidence = of_class[np.argsort(candidates.confidence_N[of_class])]
            assert (np.diff(rank[by_confidence]) >= 0).all()

    def test_ranks_have_to_be_asked_for(self):
        candidates = make_candidates(10)
        with pytest.raises(AssertionError, match="ranks=True"):
            Pool(PoolStats.of([candidates], with_ranks=False), RowRandom(0)).rank(candidates)


def plain_best(value: np.ndarray, label: np.ndarray, n: int, share_C: np.ndarray | None) -> list[int]:
    order = [i for i in sorted(range(value.size), key=lambda i: (-value[i], i)) if value[i] > NEVER]
    taken: list[int] = []
    for c, share in enumerate([] if share_C is None else share_C):
        taken += [i for i in order if label[i] == c][:share]
    others = [i for i in order if i not in taken]
    taken += others[: max(0, n - len(taken))]
    return [i for i in order if i in taken]


TEXTS = st.lists(st.tuples(st.sampled_from([NEVER, 0.0, 1.0, 1.5, 2.0]), st.integers(0, 2)), max_size=60)
SHARES = st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=3, max_size=3))


@given(texts=TEXTS, n=st.integers(-1, 65), shares=SHARES)
@example(texts=[(1.0, 0), (2.0, 0), (NEVER, 1)], n=3, shares=[1, 2, 0])  # a share that cannot be filled
def test_best_fills_shares_first_and_takes_the_largest_and_of_ties_the_first(texts, n, shares):
    value, label = np.array([v for v, _ in texts]), np.array([c for _, c in texts], dtype=int)
    share_C = None if shares is None else np.array(shares)
    n = n if shares is None else max(n, sum(shares))
    assert best(value, label, n, share_C).tolist() == plain_best(value, label, n, share_C)


class TestTopK:
    @given(texts=TEXTS, n=st.integers(0, 8), share=SHARES, borders=st.lists(st.integers(0, 60), max_size=5))
    def test_takes_from_chunks_what_a_choice_over_all_takes(self, texts, n, share, borders):
        value, label = np.array([v for v, _ in texts]), np.array([c for _, c in texts], dtype=int)
        share_C = None if share is None else np.array(share)
        n = n if share is None else max(n, sum(share))
        top, row = TopK(n, share_C), np.arange(value.size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "CHUNK", 16)  # so that it drops texts as soon as it can
            for part in divided(value.size, borders):
                top.add(row[part], value[part], label[part], row[part] * 0.5)
        chosen, expected = top.best(), best(value, label, n, share_C)
        np.testing.assert_array_equal(chosen.row_M, expected)
        np.testing.assert_array_equal(chosen.value_M, value[expected])
        np.testing.assert_array_equal(chosen.label_M, label[expected])
        np.testing.assert_array_equal(chosen.weight_M, expected * 0.5)

    @pytest.mark.parametrize("order", ["as drawn", "ascending", "descending"])
    def test_top_of_each_class_of_many(self, order, monkeypatch):
        monkeypatch.setattr(search, "CHUNK", 320)  # so that it leaves out often
        rng = np.random.default_rng(0)
        value, label = rng.integers(0, 500, 4_000).astype(float), rng.integers(0, 5, 4_000)
        if order != "as drawn":
            value = np.sort(value)[:: 1 if order == "ascending" else -1]
        share_C = np.array([7, 0, 7, 1, 7])
        top = TopK(0, share_C)
        for part in divided(4_000, list(range(0, 4_000, 100))):
            top.add(np.arange(4_000)[part], value[part], label[part])
        np.testing.assert_array_equal(top.best().row_M, plain_best(value, label, 0, share_C))


class TestClassThresholds:
    @pytest.mark.parametrize(
        ("signal", "label", "expected"),
        [
            # Global mean 0.55; class means 0.8, none, 0.3; the largest is 0.8.
            ([0.9, 0.7, 0.4, 0.2], [0, 0, 2, 2], [0.55, 0.55, 0.55 * 0.3 / 0.8]),
            ([], [], [0, 0, 0]),
            ([0, 0, 0], [0, 1, 1], [0, 0, 0]),
        ],
    )
    def test_the_global_mean_is_scaled_by_the_class_over_the_largest(self, signal, label, expected):
        label_N = np.array(label, dtype=np.int64)
        sum_C, count_C = np.bincount(label_N, signal, minlength=3), np.bincount(label_N, minlength=3)
        np.testing.assert_allclose(search.class_thresholds(sum_C, count_C), expected)


class TestConfidenceGrade:
    @given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
    def test_keeps_the_order_and_the_range(self, confidences):
        confidence = np.sort(np.array(confidences, dtype=np.float32))
        grade = search.confidence_grade(confidence)
        assert (np.diff(grade) >= 0).all()
        assert grade.min() >= 0
        assert grade.max() < search.RANK_KEYS
        ends = search.confidence_grade(np.array([0.0, 1.0, 1.0 + 1e-7]))
        assert ends.tolist() == [0, search.RANK_KEYS - 1, search.RANK_KEYS - 1]

    @given(doubt=st.floats(1e-3, 0.99), share=st.floats(0.998, 0.999))
    def test_a_thousandth_of_the_doubt_makes_a_difference(self, doubt, share):
        sure, surer = search.confidence_grade(1 - np.array([doubt, doubt * share]))
        assert surer > sure


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=60))
def test_mean_ranks_are_places_in_the_order_of_the_grades_and_ties_share_their_mean(texts):
    grade, label = np.array([g for g, _ in texts]), np.array([c for _, c in texts])
    count = np.zeros((4, 10), dtype=int)
    np.add.at(count, (label, grade), 1)
    rank = search.mean_ranks(count)[label, grade]
    for c in np.unique(label):
        of_class = grade[label == c]
        below = (of_class[None, :] < of_class[:, None]).sum(axis=1)
        ties = (of_class[None, :] == of_class[:, None]).sum(axis=1)
        np.testing.assert_allclose(rank[label == c], (below + (ties + 1) / 2) / of_class.size)
        assert rank[label == c].mean() == pytest.approx((of_class.size + 1) / 2 / of_class.size)


@pytest.mark.parametrize("n_classes", [2, 341, 342, 1_000, 32_767])
def test_counts_by_grade_stay_small(n_classes):
    step = search.rank_step(n_classes)
    assert n_classes * search.RANK_KEYS / step <= 2**24
    assert step == 1 or 2 * n_classes * search.RANK_KEYS / step > 2**24, "no coarser than need be"
