import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.quality import (
    accuracy_by_confidence,
    classification,
    ece_interval,
    expected_calibration_error,
    quality_of,
    teacher_quality,
)
from llkd_ray.metrics.uncertainty import normalise


def teacher(n=2000, classes=4, sharpness=1.0, seed=0):
    """Answers whose gold is drawn from them at sharpness 1: honest there, boasting above."""
    rng = np.random.default_rng(seed)
    fair_NC = normalise(np.exp(rng.normal(0, 1.5, (n, classes))))
    gold_N = np.minimum((fair_NC.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1), classes - 1)
    return gold_N, normalise(fair_NC**sharpness)


def quality(gold_N, p_NC, seed=0, **options):
    return teacher_quality(gold_N, p_NC, np.random.default_rng(seed), **options)


def test_figures_worked_by_hand():
    gold_N = np.array([0, 1, 0, 1])
    p_NC = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.7, 0.2, 0.1], [0.2, 0.8, 0.0]])
    figures = quality(gold_N, p_NC)
    assert figures["texts"] == 4
    assert figures["accuracy"] == 0.75
    assert figures["nll"] == pytest.approx(-np.log([0.9, 0.4, 0.7, 0.8]).mean())
    assert figures["brier"] == pytest.approx((0.02 + 0.72 + 0.14 + 0.08) / 4)
    assert figures["auroc"] == 1.0  # The wrong one is the least sure.
    zero, one, two = figures["per_class"]
    assert (zero["gold"], zero["predicted"], zero["recall"]) == (2, 3, 1.0)
    assert zero["precision"] == pytest.approx(2 / 3)
    assert zero["f1"] == pytest.approx(4 / 5)
    assert zero["confidence"] == pytest.approx((0.9 + 0.6 + 0.7) / 3)
    assert (one["precision"], one["recall"]) == (1.0, 0.5)
    assert two == {
        "gold": 0,
        "predicted": 0,
        "precision": None,
        "recall": None,
        "f1": None,
        "confidence": None,
    }


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), classes=st.integers(2, 5), seed=st.integers(0, 1000))
def test_figures_agree_with_those_of_others_and_add_up(n, classes, seed):
    gold_N, p_NC = teacher(n, classes, seed=seed)
    figures = quality(gold_N, p_NC, resamples=20)
    scores = classification(gold_N, p_NC, classes)
    assert (figures["accuracy"], figures["macro_f1"], figures["ece"]) == (
        scores.accuracy,
        scores.macro_f1,
        scores.ece,
    )
    assert figures["nll"] == pytest.approx(log_loss(gold_N, p_NC, labels=np.arange(classes)))
    correct_N, confidence_N = p_NC.argmax(axis=1) == gold_N, p_NC.max(axis=1)
    deciles = [part["accuracy"] for part in figures["by_decile"]]
    assert deciles == accuracy_by_confidence(confidence_N, correct_N, parts=10)
    bins = [one for one in figures["reliability"] if one["texts"]]
    assert len(figures["reliability"]) == 15
    assert sum(one["texts"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / n == pytest.approx(
        expected_calibration_error(confidence_N, correct_N)
    )
    for part in (bins, figures["by_decile"]):
        assert sum(one["texts"] for one in part) == n
        assert sum(one["texts"] * one["accuracy"] for one in part) == pytest.approx(correct_N.sum())
    assert sum(one["gold"] for one in figures["per_class"]) == n
    assert sum(one["predicted"] for one in figures["per_class"]) == n
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_deciles_start_with_the_surest():
    figures = quality(*teacher())
    sure = [part["confidence"] for part in figures["by_decile"]]
    assert len(sure) == 10
    assert sure == sorted(sure, reverse=True)
    assert figures["by_decile"][0]["accuracy"] > figures["by_decile"][-1]["accuracy"] + 0.3


def test_boasting_shows_in_calibration_and_log_loss_but_not_in_accuracy():
    honest, boasting = quality(*teacher()), quality(*teacher(sharpness=4.0))
    assert honest["accuracy"] == boasting["accuracy"]
    assert boasting["ece"] > honest["ece"] + 0.1
    assert boasting["nll"] > honest["nll"] + 0.3
    assert boasting["brier"] > honest["brier"] + 0.05
    assert boasting["ece_interval"][0] > honest["ece_interval"][1]


def test_confidence_that_says_nothing_has_an_auroc_of_a_half():
    rng = np.random.default_rng(0)
    gold_N = rng.integers(0, 2, 20_000)
    said_N, sure_N = rng.integers(0, 2, 20_000), rng.uniform(0.5, 1, 20_000)
    p_NC = np.where(np.eye(2)[said_N] > 0, sure_N[:, None], 1 - sure_N[:, None])
    assert quality(gold_N, p_NC, resamples=10)["auroc"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("said", [0, 1])
def test_all_right_or_all_wrong_has_no_auroc(said):
    figures = quality(np.zeros(5, dtype=int), np.tile(np.eye(2)[said], (5, 1)))
    assert figures["auroc"] is None
    assert figures["accuracy"] == 1 - said
    assert figures["nll"] == pytest.approx(said * -np.log(1e-12), abs=1e-9)
    assert figures["brier"] == 2 * said


def test_rows_need_not_sum_to_one():
    gold_N, p_NC = teacher(300)
    part, whole = quality(gold_N, 0.25 * p_NC), quality(gold_N, p_NC)
    assert part["nll"] == pytest.approx(whole["nll"])
    assert part["brier"] == pytest.approx(whole["brier"])


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


def test_the_same_chance_gives_the_same_figures():
    gold_N, p_NC = teacher(500)
    assert quality(gold_N, p_NC, seed=5) == quality(gold_N, p_NC, seed=5)


def test_ten_thousand_texts_take_seconds_at_most():
    gold_N, p_NC = teacher(10_000, classes=77)
    start = time.process_time()
    quality(gold_N, p_NC)
    assert time.process_time() - start < 10  # 0.6 s by itself


@pytest.mark.parametrize(
    ("gold_N", "p_NC", "message"),
    [
        ([], np.empty((0, 3)), "is empty"),
        ([0, -1], np.ones((2, 3)), "outside 0..2"),
        ([0, 3], np.ones((2, 3)), "outside 0..2"),
        ([0], np.ones((2, 3)), "not the same"),
        ([0, 1], np.ones(2), "one row a text"),
        ([0, 1], [[0.5, np.nan], [0.5, 0.5]], "not finite"),
        ([0, 1], [[0.5, -0.1], [0.5, 0.5]], "not negative"),
    ],
)
def test_mistakes_are_named(gold_N, p_NC, message):
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
