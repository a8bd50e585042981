from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llkd_ray.metrics import uncertainty
from llkd_ray.selection import search
from llkd_ray.student.train import MovingThreshold


def test_normalise_divides_by_the_mass_on_labels():
    np.testing.assert_allclose(
        uncertainty.normalise(np.array([[0.2, 0.6], [1.0, 1.0]])), [[0.25, 0.75], [0.5, 0.5]]
    )


def test_normalise_gives_uniform_where_no_label_has_mass():
    np.testing.assert_allclose(uncertainty.normalise(np.zeros((1, 4))), np.full((1, 4), 0.25))


def test_confidence_is_the_largest_probability():
    np.testing.assert_allclose(uncertainty.confidence(np.array([[0.2, 0.7, 0.1]])), [0.7])


@pytest.mark.parametrize("n_classes", [2, 5, 77])
def test_entropy_is_zero_when_certain_and_one_when_uniform(n_classes):
    certain = np.eye(n_classes)[:1]
    uniform = np.full((1, n_classes), 1 / n_classes)
    assert uncertainty.entropy(certain)[0] == 0.0
    assert uncertainty.entropy(uniform)[0] == pytest.approx(1.0)


def test_entropy_of_two_classes_in_bits():
    p = np.array([[0.25, 0.75]])
    assert uncertainty.entropy(p)[0] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def thresholds(signal, label, n_classes):
    return search.class_thresholds(*sums(signal, label, n_classes))


def test_class_thresholds_scale_the_global_mean_by_the_class_over_the_largest():
    signal = np.array([0.9, 0.7, 0.4, 0.2])
    label = np.array([0, 0, 2, 2])
    # Global mean 0.55; class means 0.8, none, 0.3; the largest is 0.8.
    np.testing.assert_allclose(thresholds(signal, label, 3), [0.55, 0.55, 0.55 * 0.3 / 0.8])


def test_class_thresholds_of_nothing():
    empty = thresholds(np.array([]), np.array([], dtype=int), 3)
    np.testing.assert_array_equal(empty, np.zeros(3))


def test_class_thresholds_of_a_signal_that_is_zero_everywhere():
    zero = thresholds(np.zeros(3), np.array([0, 1, 1]), 2)
    np.testing.assert_array_equal(zero, np.zeros(2))


def test_margin_is_the_best_less_the_second():
    p = np.array([[0.2, 0.7, 0.1], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(uncertainty.margin(p), [0.5, 0.0, 1.0])


def test_support_is_what_one_model_gives_to_anothers_label():
    p = np.array([[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    np.testing.assert_allclose(uncertainty.support(p, np.array([2, 0])), [0.1, 0.6])


class TestConfidenceGrade:
    @given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
    def test_keeps_the_order_and_the_range(self, confidences):
        confidence = np.sort(np.array(confidences, dtype=np.float32))
        grade = search.confidence_grade(confidence)
        assert (np.diff(grade) >= 0).all()
        assert grade.min() >= 0
        assert grade.max() < search.RANK_KEYS

    def test_the_ends(self):
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


def sums(signal, label, n_classes=4):
    """What a step tells the moving threshold: sum and count of each class."""
    return np.bincount(label, weights=signal, minlength=n_classes), np.bincount(label, minlength=n_classes)


class TestMovingThreshold:
    def test_starts_at_one_over_the_classes(self):
        start = MovingThreshold.start(4)
        assert start.momentum == 0.999
        # The largest class average is divided out, so at first all classes have the global value.
        np.testing.assert_allclose(start.of_class(), np.full(4, 0.25))

    def test_moves_by_a_step_in_freematchs_form(self):
        after = MovingThreshold.start(2, momentum=0.9).after(*sums([0.8, 0.6, 1.0], [0, 0, 1], 2))
        overall = 0.9 * 0.5 + 0.1 * 0.8
        of_class = np.array([0.9 * 0.5 + 0.1 * 0.7, 0.9 * 0.5 + 0.1 * 1.0])
        assert after.overall == pytest.approx(overall)
        np.testing.assert_allclose(after.class_C, of_class)
        np.testing.assert_allclose(after.of_class(), overall * of_class / of_class[1])

    def test_a_class_without_texts_stays(self):
        after = MovingThreshold.start(3, momentum=0.5).after(*sums([0.9], [1], 3))
        np.testing.assert_allclose(after.class_C, [1 / 3, (1 / 3 + 0.9) / 2, 1 / 3])

    def test_a_step_without_texts_changes_nothing(self):
        start = MovingThreshold.start(3)
        assert start.after(np.zeros(3), np.zeros(3, dtype=int)) is start

    def test_comes_to_the_means_of_a_signal_that_stays(self):
        threshold = MovingThreshold.start(2, momentum=0.9)
        signal, label = np.array([0.9, 0.9, 0.3, 0.3]), np.array([0, 0, 1, 1])
        for _ in range(300):
            threshold = threshold.after(*sums(signal, label, 2))
        np.testing.assert_allclose(threshold.of_class(), thresholds(signal, label, 2), rtol=1e-6)

    def test_does_not_depend_on_how_a_step_is_shared_out(self):
        rng = np.random.default_rng(0)
        signal, label = rng.uniform(size=32), rng.integers(0, 4, 32)
        whole = MovingThreshold.start(4).after(*sums(signal, label))
        shards = [sums(signal[rank::3], label[rank::3]) for rank in range(3)]
        shared = MovingThreshold.start(4).after(sum(s for s, _ in shards), sum(c for _, c in shards))
        assert shared.overall == pytest.approx(whole.overall)
        np.testing.assert_allclose(shared.of_class(), whole.of_class())

    def test_of_a_signal_that_is_zero_everywhere(self):
        threshold = MovingThreshold(0.0, np.zeros(3)).of_class()
        np.testing.assert_array_equal(threshold, np.zeros(3))
