import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.quality import (
    accuracy_interval,
    agreement,
    classification,
    ece_interval,
    expected_calibration_error,
    has_plateaued,
    macro_f1_interval,
    quality_of,
    teacher_quality,
)
from llkd_ray.metrics.uncertainty import normalise


def one_hot(labels_N, classes, certainty=1.0):
    """Answers that give ``certainty`` to a label and the rest to the others, alike."""
    p_NC = np.full((len(labels_N), classes), (1 - certainty) / (classes - 1))
    p_NC[np.arange(len(labels_N)), labels_N] = certainty
    return p_NC


def test_calibration_error_is_small_for_calibrated_confidence_and_large_for_over_confidence():
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


def skewed(n):
    rng = np.random.default_rng(1)
    gold_N = rng.choice(4, n, p=[0.6, 0.25, 0.1, 0.05])
    return gold_N, np.where(rng.random(n) < 0.7, gold_N, rng.integers(0, 4, n))


def test_the_interval_of_macro_f1_is_that_of_texts_drawn_with_replacement():
    gold_N, predicted_N = skewed(300)
    rng, values = np.random.default_rng(1), []
    for _ in range(1500):
        drawn = rng.integers(0, 300, 300)
        values.append(f1_score(gold_N[drawn], predicted_N[drawn], average="macro", zero_division=0))
    found = macro_f1_interval(gold_N, predicted_N, np.random.default_rng(2), resamples=4000)
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.012)
    assert macro_f1_interval(gold_N, predicted_N, np.random.default_rng(2), resamples=4000) == found


def test_the_interval_of_an_accuracy_is_exact():
    gold_N, predicted_N = skewed(200)
    expected = binomtest(int((gold_N == predicted_N).sum()), 200).proportion_ci(0.95, method="exact")
    assert accuracy_interval(gold_N, predicted_N) == pytest.approx((expected.low, expected.high))


def test_a_student_that_is_always_right_is_not_sure_to_be():
    gold_N = np.arange(100) % 3
    for found in (
        accuracy_interval(gold_N, gold_N),
        macro_f1_interval(gold_N, gold_N, np.random.default_rng(0)),
    ):
        assert found == pytest.approx((0.9638, 1.0), abs=1e-4)
    low, high = macro_f1_interval(gold_N, (gold_N + 1) % 3, np.random.default_rng(0))
    assert (low, high) == pytest.approx((0.0, 0.0362), abs=1e-4)


def test_agreement_looks_at_the_label_alone():
    student_NC, teacher_NC = one_hot([0, 1, 1, 2], 3, 0.5), one_hot([0, 1, 2, 2], 3, 0.9)
    assert agreement(student_NC, teacher_NC) == 0.75


EMPTY, EMPTY_P = np.array([], dtype=int), np.empty((0, 3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "call",
    [
        lambda: classification(EMPTY, EMPTY_P, 3),
        lambda: expected_calibration_error(EMPTY, EMPTY),
        lambda: macro_f1_interval(EMPTY, EMPTY, np.random.default_rng(0)),
        lambda: agreement(EMPTY_P, EMPTY_P),
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
        (lambda: agreement(np.ones((2, 3)), np.ones((2, 4))), "same texts and classes"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("curve", "flat"),
    [
        *(([], False), ([0.5], False), ([0.5, 0.6], False), ([0.6, 0.5, 0.5], True)),
        *(([0.5, 0.6, 0.604, 0.6], True), ([0.5, 0.6, 0.6, 0.61], False)),
    ],
)
def test_a_curve_has_flattened_when_none_of_the_last_beats_the_best_before(curve, flat):
    assert has_plateaued(curve, patience=2, min_gain=0.005) is flat


def teacher(n=2000, classes=4, sharpness=1.0, seed=0):
    """Answers whose gold is drawn from them at sharpness 1: calibrated there, over-confident above."""
    rng = np.random.default_rng(seed)
    fair_NC = normalise(np.exp(rng.normal(0, 1.5, (n, classes))))
    gold_N = np.minimum((fair_NC.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1), classes - 1)
    return gold_N, normalise(fair_NC**sharpness)


def quality(gold_N, p_NC, seed=0, **options):
    return teacher_quality(gold_N, p_NC, np.random.default_rng(seed), **options)


def test_figures_of_classes_worked_by_hand():
    p_NC = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.7, 0.2, 0.1], [0.2, 0.8, 0.0]])
    zero, one, two = quality(np.array([0, 1, 0, 1]), p_NC)["per_class"]
    assert (zero["gold"], zero["predicted"], zero["recall"]) == (2, 3, 1.0)
    assert (zero["precision"], zero["f1"]) == pytest.approx((2 / 3, 4 / 5))
    assert zero["confidence"] == pytest.approx((0.9 + 0.6 + 0.7) / 3)
    assert (one["precision"], one["recall"]) == (1.0, 0.5)
    unknown = dict.fromkeys(("precision", "recall", "f1", "confidence"))
    assert two == {"gold": 0, "predicted": 0} | unknown


def plain_ece(confidence_N, correct_N):
    """With 15 bins that are closed on the right."""
    bin_N = np.ceil(confidence_N * 15)
    gaps = [abs((confidence_N - correct_N)[bin_N == one].sum()) for one in range(16)]
    return sum(gaps) / confidence_N.size


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), classes=st.integers(2, 5), seed=st.integers(0, 1000))
def test_figures_agree_with_those_of_others_and_add_up(n, classes, seed):
    gold_N, p_NC = teacher(n, classes, seed=seed)
    figures = quality(gold_N, p_NC, resamples=20)
    said_N, confidence_N = p_NC.argmax(axis=1), p_NC.max(axis=1)
    correct_N = said_N == gold_N
    scores = classification(gold_N, p_NC, classes)
    assert (scores.accuracy, scores.macro_f1, scores.ece) == (
        pytest.approx(accuracy_score(gold_N, said_N)),
        pytest.approx(f1_score(gold_N, said_N, average="macro", zero_division=0)),
        pytest.approx(plain_ece(confidence_N, correct_N)),
    )
    assert {name: figures[name] for name in vars(scores)} == vars(scores)
    assert figures["nll"] == pytest.approx(log_loss(gold_N, p_NC, labels=np.arange(classes)))
    assert figures["brier"] == pytest.approx(((p_NC - np.eye(classes)[gold_N]) ** 2).sum(axis=1).mean())
    if 0 < correct_N.sum() < n:
        assert figures["auroc"] == pytest.approx(roc_auc_score(correct_N, confidence_N))
    assert quality(gold_N, p_NC, resamples=20) == figures, "chance is an argument"
    assert quality(gold_N, 0.25 * p_NC, resamples=20) == figures, "rows need not sum to one"
    parts = np.array_split(np.argsort(-confidence_N, kind="stable"), min(10, n))
    assert [part["accuracy"] for part in figures["by_decile"]] == [correct_N[part].mean() for part in parts]
    bins = [one for one in figures["reliability"] if one["texts"]]
    assert len(figures["reliability"]) == 15
    gaps = [one["texts"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
    assert sum(gaps) / n == pytest.approx(figures["ece"])
    for part in (bins, figures["by_decile"]):
        assert sum(one["texts"] for one in part) == n
        assert sum(one["texts"] * one["accuracy"] for one in part) == pytest.approx(correct_N.sum())
    for name in ("gold", "predicted"):
        assert sum(one[name] for one in figures["per_class"]) == n
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("said", [0, 1])
def test_all_right_or_all_wrong_has_no_auroc(said):
    figures = quality(np.zeros(5, dtype=int), np.tile(np.eye(2)[said], (5, 1)))
    assert figures["auroc"] is None
    assert figures["accuracy"] == 1 - said
    assert figures["nll"] == pytest.approx(said * -np.log(1e-12), abs=1e-9)
    assert figures["brier"] == 2 * said


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_the_interval_holds_the_true_calibration_error_in_most_samples(sharpness):
    gold_N, p_NC = teacher(400_000, sharpness=sharpness)
    correct_N, confidence_N = p_NC.argmax(axis=1) == gold_N, p_NC.max(axis=1)
    true = expected_calibration_error(confidence_N, correct_N)
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        i = rng.integers(0, 400_000, 2000)
        low, high = ece_interval(confidence_N[i], correct_N[i], rng, resamples=200)
        assert 0 <= low <= high
        inside += low <= true <= high
    # The resamples' own quantiles hold the honest teacher's true error (about 0) in none of the samples.
    assert inside >= (48 if sharpness > 1 else 24)


def test_the_interval_agrees_with_the_bootstrap_text_by_text_in_blocks_or_not(monkeypatch):
    gold_N, p_NC = teacher(300, sharpness=3.0)
    correct_N, confidence_N = p_NC.argmax(axis=1) == gold_N, p_NC.max(axis=1)
    rng = np.random.default_rng(2)
    drawn = [rng.integers(0, 300, 300) for _ in range(2000)]
    values = [expected_calibration_error(confidence_N[i], correct_N[i]) for i in drawn]
    estimate = expected_calibration_error(confidence_N, correct_N)
    expected = 2 * estimate - np.quantile(values, [0.975, 0.025])
    found = ece_interval(confidence_N, correct_N, np.random.default_rng(3), resamples=4000)
    np.testing.assert_allclose(found, expected, atol=0.008)
    monkeypatch.setattr("llkd_ray.metrics.quality.BLOCK", 1000)
    again = ece_interval(confidence_N, correct_N, np.random.default_rng(3), resamples=4000)
    assert again == pytest.approx(found)


@pytest.mark.parametrize(
    ("gold_N", "p_NC", "message"),
    [
        ([], np.empty((0, 3)), "is empty"),
        ([0, 3], np.ones((2, 3)), "outside 0..2"),
        ([0, 1], np.ones(2), "one row a text"),
        ([0, 1], [[0.5, np.nan], [0.5, 0.5]], "not finite"),
        ([0, 1], [[0.5, -0.1], [0.5, 0.5]], "not negative"),
    ],
)
def test_a_teachers_mistakes_are_named(gold_N, p_NC, message):
    with pytest.raises(ValueError, match=message):
        quality(np.array(gold_N, dtype=int), np.array(p_NC))


def test_raw_and_used_are_of_the_texts_with_gold():
    gold_N, p_NC = teacher(1000, sharpness=3.0)
    gold_N[::4] = -1
    figures = quality_of(
        0.5 * p_NC, gold_N, Calibrator("temperature", temperature=3.0, fitted_on=40), np.random.default_rng(0)
    )
    assert (figures["method"], figures["fitted_on"]) == ("temperature", 40)
    assert figures["raw"]["texts"] == figures["used"]["texts"] == 750
    assert figures["used"]["nll"] < figures["raw"]["nll"]
    assert figures["used"]["accuracy"] == figures["raw"]["accuracy"]
    assert quality_of(p_NC, gold_N, Calibrator(), np.random.default_rng(0))["fitted_on"] is None
    assert quality_of(p_NC, np.full(1000, -1), Calibrator(), np.random.default_rng(0)) is None
