import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from llkd_ray.metrics.quality import (
    accuracy_by_confidence,
    agreement,
    bootstrap_interval,
    classification,
    expected_calibration_error,
    has_plateaued,
)


def one_hot(labels_N, classes, certainty=1.0):
    """Answers that give ``certainty`` to a label and the rest to the others, alike."""
    p_NC = np.full((len(labels_N), classes), (1 - certainty) / (classes - 1))
    p_NC[np.arange(len(labels_N)), labels_N] = certainty
    return p_NC


def test_perfect_answers_score_one_with_no_calibration_error():
    gold_N = np.array([0, 1, 2, 1])
    scores = classification(gold_N, one_hot(gold_N, 3), labels=3)
    assert (scores.accuracy, scores.macro_f1, scores.ece) == (1.0, 1.0, 0.0)


def test_scores_worked_by_hand():
    # Class 0: 2 of 3 found, nothing wrongly added: F1 4/5. Class 1: 1 hit, 1 false alarm: F1 2/3.
    # Class 2 occurs nowhere and does not count.
    gold_N, predicted_N = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    scores = classification(gold_N, one_hot(predicted_N, 3, certainty=0.9), labels=3)
    assert scores.accuracy == 0.75
    assert scores.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert scores.ece == pytest.approx(0.9 - 0.75)


def test_a_class_that_is_never_answered_counts_as_zero():
    scores = classification(np.array([0, 1]), one_hot(np.array([0, 0]), 2), labels=2)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_probabilities_need_not_sum_to_one():
    gold_N, p_NC = np.array([0, 1, 0]), np.array([[0.6, 0.2], [0.3, 0.5], [0.2, 0.7]])
    whole, part = classification(gold_N, p_NC, 2), classification(gold_N, p_NC / 2, 2)
    assert (whole.accuracy, whole.macro_f1) == (part.accuracy, part.macro_f1)
    assert whole.ece == pytest.approx(part.ece, abs=1e-6)


def test_calibration_error_is_small_for_honest_confidence_and_large_for_boasting():
    rng = np.random.default_rng(0)
    confidence_N = rng.uniform(0.3, 1, 50_000)
    correct_N = rng.random(50_000) < confidence_N
    assert expected_calibration_error(confidence_N, correct_N) < 0.01
    assert expected_calibration_error(np.ones(50_000), correct_N) == pytest.approx(1 - correct_N.mean())


def test_calibration_bins_are_closed_on_the_right():
    # With two bins 0.5 belongs to the first: gaps of opposite sign in different bins do not cancel.
    confidence_N, correct_N = np.array([0.5, 0.75]), np.array([True, False])
    assert expected_calibration_error(confidence_N, correct_N, bins=2) == pytest.approx((0.5 + 0.75) / 2)
    assert expected_calibration_error(confidence_N, correct_N, bins=1) == pytest.approx(0.25 / 2)
    assert expected_calibration_error(np.array([0.0]), np.array([False])) == 0


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_interval_agrees_with_the_bootstrap_by_texts(metric):
    rng = np.random.default_rng(1)
    gold_N = rng.choice(4, size=300, p=[0.5, 0.3, 0.15, 0.05])
    predicted_N = np.where(rng.random(300) < 0.7, gold_N, rng.integers(0, 4, 300))
    values = []
    for _ in range(1000):
        drawn = rng.integers(0, 300, 300)
        score = (
            accuracy_score(gold_N[drawn], predicted_N[drawn])
            if metric == "accuracy"
            else f1_score(gold_N[drawn], predicted_N[drawn], average="macro", zero_division=0)
        )
        values.append(score)
    low, high = bootstrap_interval(gold_N, predicted_N, metric, np.random.default_rng(2), resamples=4000)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.012)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_interval_holds_the_estimate_narrows_with_texts_and_is_reproducible(metric):
    rng = np.random.default_rng(3)
    gold_N = rng.integers(0, 77, 20_000)
    predicted_N = np.where(rng.random(20_000) < 0.8, gold_N, rng.integers(0, 77, 20_000))

    def interval(n, level=0.95):
        return bootstrap_interval(
            gold_N[:n], predicted_N[:n], metric, np.random.default_rng(4), resamples=200, level=level
        )

    low, high = interval(20_000)
    assert low < 0.8 + 0.2 / 77 < high
    assert high - low < 0.5 * np.diff(interval(1_000))[0]
    assert np.diff(interval(20_000, level=0.5))[0] < high - low
    assert interval(20_000) == (low, high)


def test_interval_of_perfect_answers_is_a_point():
    gold_N = np.array([0, 1, 2, 2])
    rng = np.random.default_rng(0)
    assert bootstrap_interval(gold_N, gold_N, "accuracy", rng) == (1.0, 1.0)
    assert bootstrap_interval(gold_N, gold_N, "macro_f1", rng) == (1.0, 1.0)


def test_agreement_looks_at_the_label_alone():
    student_NC, teacher_NC = one_hot([0, 1, 1, 2], 3, 0.5), one_hot([0, 1, 2, 2], 3, 0.9)
    assert agreement(student_NC, teacher_NC) == 0.75


def test_accuracy_by_confidence_starts_with_the_most_confident():
    confidence_N = np.array([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])
    correct_N = np.array([False, True, False, True, True, False])
    assert accuracy_by_confidence(confidence_N, correct_N, parts=3) == [1.0, 0.0, 0.5]
    assert accuracy_by_confidence(confidence_N, correct_N, parts=10) == [1, 1, 0, 0, 1, 0]
    sizes_5 = accuracy_by_confidence(np.linspace(1, 0, 11), np.ones(11), parts=5)
    assert sizes_5 == [1.0] * 5


def interval_of_ones(metric="accuracy", **options):
    return bootstrap_interval(np.ones(2), np.ones(2), metric, np.random.default_rng(0), **options)


EMPTY, EMPTY_P = np.array([], dtype=int), np.empty((0, 3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "call",
    [
        lambda: classification(EMPTY, EMPTY_P, 3),
        lambda: expected_calibration_error(EMPTY, EMPTY),
        lambda: bootstrap_interval(EMPTY, EMPTY, "accuracy", np.random.default_rng(0)),
        lambda: agreement(EMPTY_P, EMPTY_P),
        lambda: accuracy_by_confidence(EMPTY, EMPTY),
    ],
)
def test_empty_input_is_refused(call):
    with pytest.raises(ValueError, match="is empty"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification(np.array([0, -1]), np.ones((2, 3)), 3), "outside 0..2"),
        (lambda: classification(np.array([0, 3]), np.ones((2, 3)), 3), "outside 0..2"),
        (lambda: classification(np.array([0, 1]), np.ones((2, 3)), 4), "4 columns"),
        (lambda: classification(np.array([0]), np.ones((2, 3)), 3), "not the same"),
        (lambda: expected_calibration_error(np.array([1.2]), np.array([1])), "outside 0..1"),
        (lambda: expected_calibration_error(np.array([np.nan]), np.array([1])), "not finite"),
        (lambda: classification(np.array([0]), np.array([[np.nan, 1]]), 2), "not finite"),
        (lambda: expected_calibration_error(np.array([0.2]), np.array([1]), bins=0), "bins is 0"),
        (lambda: accuracy_by_confidence(np.array([0.2]), np.array([1]), parts=0), "parts is 0"),
        (lambda: agreement(np.ones((2, 3)), np.ones((2, 4))), "same texts and classes"),
        (lambda: interval_of_ones(metric="f2"), "'f2'"),
        (
            lambda: bootstrap_interval(
                np.ones(2), np.ones(2), "accuracy", np.random.default_rng(0), level=95
            ),
            "level is 95",
        ),
        (
            lambda: bootstrap_interval(
                np.ones(2), np.ones(2), "accuracy", np.random.default_rng(0), resamples=0
            ),
            "resamples is 0",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("curve", "flat"),
    [
        ([], False),
        ([0.5], False),
        ([0.5, 0.6], False),
        ([0.5, 0.6, 0.604, 0.6], True),
        ([0.5, 0.6, 0.6, 0.61], False),
        ([0.6, 0.5, 0.5], True),
    ],
)
def test_a_curve_has_flattened_when_none_of_the_last_beats_the_best_before(curve, flat):
    assert has_plateaued(curve, patience=2, min_gain=0.005) is flat
