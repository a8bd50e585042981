from __future__ import annotations

import numpy as np
import pytest

from llkd_ray import signals


def test_normalise_divides_by_the_mass_on_labels():
    np.testing.assert_allclose(
        signals.normalise(np.array([[0.2, 0.6], [1.0, 1.0]])), [[0.25, 0.75], [0.5, 0.5]]
    )


def test_normalise_gives_uniform_where_no_label_has_mass():
    np.testing.assert_allclose(signals.normalise(np.zeros((1, 4))), np.full((1, 4), 0.25))


def test_confidence_is_the_largest_probability():
    np.testing.assert_allclose(signals.confidence(np.array([[0.2, 0.7, 0.1]])), [0.7])


@pytest.mark.parametrize("n_classes", [2, 5, 77])
def test_entropy_is_zero_when_certain_and_one_when_uniform(n_classes):
    certain = np.eye(n_classes)[:1]
    uniform = np.full((1, n_classes), 1 / n_classes)
    assert signals.entropy(certain)[0] == 0.0
    assert signals.entropy(uniform)[0] == pytest.approx(1.0)


def test_entropy_of_two_classes_in_bits():
    p = np.array([[0.25, 0.75]])
    assert signals.entropy(p)[0] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def test_class_thresholds_scale_the_global_mean_by_the_class_over_the_largest():
    signal = np.array([0.9, 0.7, 0.4, 0.2])
    label = np.array([0, 0, 2, 2])
    # Global mean 0.55; class means 0.8, none, 0.3; the largest is 0.8.
    np.testing.assert_allclose(signals.class_thresholds(signal, label, 3), [0.55, 0.55, 0.55 * 0.3 / 0.8])


def test_class_thresholds_of_nothing():
    empty = signals.class_thresholds(np.array([]), np.array([], dtype=int), 3)
    np.testing.assert_array_equal(empty, np.zeros(3))


def test_class_thresholds_of_a_signal_that_is_zero_everywhere():
    zero = signals.class_thresholds(np.zeros(3), np.array([0, 1, 1]), 2)
    np.testing.assert_array_equal(zero, np.zeros(2))
