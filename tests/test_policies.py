"""One contract for every policy, and what each of ours promises beyond it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray import policies
from llkd_ray.policies import ACQUISITION, SELECTION
from llkd_ray.signals import class_thresholds
from llkd_ray.table import Candidates


def make_candidates(n: int, seed: int = 0, n_classes: int = 4, scored: float = 1.0) -> Candidates:
    rng = np.random.default_rng(seed)
    uncertainty = rng.uniform(0, 1, n)
    uncertainty[rng.uniform(0, 1, n) > scored] = np.nan
    return Candidates(
        row_N=np.sort(rng.choice(10 * n + 1, n, replace=False)),
        label_N=rng.integers(0, n_classes, n),
        confidence_N=rng.uniform(1 / n_classes, 1, n),
        uncertainty_N=uncertainty,
        n_classes=n_classes,
    )


def choose(name: str, candidates: Candidates, n: int, seed: int = 0) -> policies.Selection:
    return SELECTION[name].choose(candidates, n, np.random.default_rng(seed))


@pytest.mark.parametrize("name", sorted(SELECTION))
@pytest.mark.parametrize("scored", [0.0, 0.5, 1.0])
class TestSelectionContract:
    @settings(max_examples=30, deadline=None)
    @given(n_candidates=st.integers(0, 200), n=st.integers(0, 250), seed=st.integers(0, 2**32))
    def test_size_membership_and_weights(self, name, scored, n_candidates, n, seed):
        candidates = make_candidates(n_candidates, seed, scored=scored)
        chosen = choose(name, candidates, n, seed)
        assert len(chosen) <= min(n, n_candidates)
        assert np.unique(chosen.row_M).size == len(chosen), "a row was chosen twice"
        assert np.isin(chosen.row_M, candidates.row_N).all()
        assert chosen.weight_M.shape == chosen.row_M.shape
        assert (chosen.weight_M >= 0).all()
        assert len(chosen) == 0 or chosen.weight_M.mean() == pytest.approx(1.0)

    def test_chooses_something(self, name, scored):
        assert len(choose(name, make_candidates(100, scored=scored), 10)) > 0

    def test_same_seed_same_choice(self, name, scored):
        candidates = make_candidates(150, scored=scored)
        first, second = choose(name, candidates, 40, seed=3), choose(name, candidates, 40, seed=3)
        np.testing.assert_array_equal(first.row_M, second.row_M)
        np.testing.assert_array_equal(first.weight_M, second.weight_M)

    def test_order_of_candidates_does_not_matter(self, name, scored):
        candidates = make_candidates(150, scored=scored)
        shuffled = candidates.take(np.random.default_rng(9).permutation(150))
        np.testing.assert_array_equal(
            choose(name, candidates, 40, seed=3).row_M, choose(name, shuffled, 40, seed=3).row_M
        )

    def test_input_is_left_alone(self, name, scored):
        candidates = make_candidates(50, scored=scored)
        before = [column.copy() for column in vars(candidates).values() if isinstance(column, np.ndarray)]
        choose(name, candidates, 20)
        after = [column for column in vars(candidates).values() if isinstance(column, np.ndarray)]
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old, new)

    def test_one_class_only(self, name, scored):
        candidates = make_candidates(30, n_classes=1, scored=scored)
        assert len(choose(name, candidates, 10)) <= 10


@pytest.mark.parametrize("name", sorted(ACQUISITION))
class TestAcquisitionContract:
    @settings(max_examples=50, deadline=None)
    @given(n_unread=st.integers(0, 200), n=st.integers(0, 250), seed=st.integers(0, 2**32))
    def test_size_and_membership(self, name, n_unread, n, seed):
        unread = np.sort(np.random.default_rng(seed).choice(1000, n_unread, replace=False))
        rows = ACQUISITION[name](unread, n, np.random.default_rng(seed))
        assert rows.size == min(n, n_unread)
        assert np.unique(rows).size == rows.size
        assert np.isin(rows, unread).all()

    def test_same_seed_same_choice(self, name):
        unread = np.arange(0, 500, 3)
        first = ACQUISITION[name](unread, 20, np.random.default_rng(1))
        second = ACQUISITION[name](unread, 20, np.random.default_rng(1))
        np.testing.assert_array_equal(first, second)


def test_random_selection_takes_all_it_may():
    assert len(choose("random", make_candidates(100), 60)) == 60
    assert len(choose("random", make_candidates(100), 600)) == 100


def test_llkd_takes_only_texts_over_both_thresholds_best_first():
    candidates = make_candidates(400)
    chosen = choose("llkd", candidates, 400)
    confident = class_thresholds(candidates.confidence_N, candidates.label_N, 4)[candidates.label_N]
    uncertain = class_thresholds(candidates.uncertainty_N, candidates.label_N, 4)[candidates.label_N]
    passing = (candidates.confidence_N >= confident) & (candidates.uncertainty_N >= uncertain)
    assert 0 < passing.sum() < 400
    assert set(chosen.row_M) == set(candidates.row_N[passing])
    place = {row: i for i, row in enumerate(candidates.row_N)}
    index = [place[row] for row in chosen.row_M]
    value = candidates.confidence_N[index] * candidates.uncertainty_N[index]
    assert (np.diff(value) <= 0).all()
    np.testing.assert_allclose(chosen.weight_M, value / value.mean())


def test_llkd_without_a_student_draws_among_the_confident():
    candidates = make_candidates(400, scored=0.0)
    chosen = choose("llkd", candidates, 50)
    threshold = class_thresholds(candidates.confidence_N, candidates.label_N, 4)[candidates.label_N]
    confident = set(candidates.row_N[candidates.confidence_N >= threshold])
    assert len(chosen) == 50
    assert set(chosen.row_M) <= confident
    assert (chosen.weight_M == 1).all()
    assert set(chosen.row_M) != set(choose("llkd", candidates, 50, seed=1).row_M)


def test_llkd_takes_a_text_the_student_never_saw_as_unknown():
    candidates = Candidates(
        row_N=np.arange(4),
        label_N=np.zeros(4, dtype=int),
        confidence_N=np.full(4, 0.9),
        uncertainty_N=np.array([0.1, 0.2, 0.3, np.nan]),
        n_classes=2,
    )
    assert choose("llkd", candidates, 1).row_M.tolist() == [3]
