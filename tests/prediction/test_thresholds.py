"""Thresholds by precision: the promise holds on new texts, and it is said where nothing can be promised."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from llkd_ray.prediction.results import (
    STARTS,
    Thresholds,
    as_dict,
    describe,
    fewest_texts,
    fit,
    grade_confidence,
    lowest_threshold,
    measure,
)

LABELS = ("low", "middle", "high")
ALL = Thresholds.given(LABELS, {})


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of up to 40 texts over three classes, and their true classes; confidences tie often."""
    n = draw(st.integers(1, 40))
    parts_NC = np.array(draw(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=n, max_size=n)))
    p_NC = (parts_NC + 0.1) / (parts_NC + 0.1).sum(axis=1, keepdims=True)
    gold_N = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    return p_NC.astype(np.float32), gold_N


@given(answers(), st.sampled_from([0.2, 0.3, 0.5, 0.75, 0.9]))
def test_what_is_accepted_reaches_the_precision_by_its_lower_bound(found, wanted):
    p_NC, gold_N = found
    thresholds, measured = fit(ALL, p_NC, gold_N, wanted, ())
    accepted_N, predicted_N, confidence_N = thresholds.accept(p_NC), p_NC.argmax(axis=1), p_NC.max(axis=1)
    for c, label in enumerate(LABELS):
        one, of_class = measured[label], predicted_N == c
        assert one.accepted == (accepted_N & of_class).sum()
        assert one.right == (gold_N[accepted_N & of_class] == c).sum()
        assert one.gold_texts == (gold_N == c).sum()
        assert one.answered_right == (gold_N[of_class] == c).sum()
        assert (one.threshold is None) == (not one.accepted)
        if one.accepted:
            assert thresholds.threshold_C[c] in confidence_N[of_class]
            share = 0.05 / len(LABELS) / STARTS
            assert beta.ppf(share, one.right, one.accepted - one.right + 1) >= wanted
            assert one.precision_low <= one.precision <= one.precision_high
            assert one.accepted >= one.needed
        elif len(set(confidence_N[of_class])) == of_class.sum() and one.answered == one.answered_right:
            assert one.answered < one.needed, "all answers are right, and there are enough of them"
    assert sum(one.answered for one in measured.values()) == gold_N.size


def overconfident(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and how often such answers are right: on average .7, from .98 on just above .9."""
    x_N = rng.random(n)
    return x_N, 0.48 + 0.44 * x_N


def always_just_below(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.random(n), np.full(n, 0.895)


def mostly_good(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x_N = rng.random(n)
    return x_N, np.where(x_N > 0.2, 0.97, 0.5)


@pytest.mark.parametrize("n", [30, 100, 300, 1000])
@pytest.mark.parametrize("world", [overconfident, always_just_below, mostly_good])
def test_the_promise_is_broken_in_at_most_delta_of_the_runs(world, n):
    rng, wanted, delta, runs = np.random.default_rng(n), 0.9, 0.1, 400
    everything, right_of = world(200_000, rng)
    broken = accepting = 0
    for _ in range(runs):
        confidence_N, p_right_N = world(n, rng)
        threshold = lowest_threshold(confidence_N, rng.random(n) < p_right_N, wanted, delta)
        if threshold <= 1:
            accepting += 1
            broken += right_of[everything >= threshold].mean() < wanted
    # Three standard deviations of the count at a rate of delta.
    assert broken <= runs * delta + 3 * np.sqrt(runs * delta * (1 - delta))
    if world is mostly_good and n >= 300:
        assert accepting > 0.9 * runs, "a label that is good enough is found so"


@given(answers(), st.integers(0, 2), st.sampled_from([0.5, 0.9]))
def test_grades_ask_one_question(found, grade, wanted):
    p_NC, gold_N = found
    thresholds, measured = fit(Thresholds.given(LABELS, {}, LABELS[grade]), p_NC, gold_N, wanted, ())
    (one,) = measured.values()
    accepted_N = thresholds.accept(p_NC)
    assert one.answered == gold_N.size
    assert one.accepted == accepted_N.sum()
    if accepted_N.any():
        assert (gold_N[accepted_N] >= grade).mean() >= wanted
        # All that are as sure are accepted, whatever their own label is.
        assert grade_confidence(p_NC, grade)[~accepted_N].max(initial=-1) < one.threshold


def test_a_grade_counts_the_grades_above_it_and_labels_without_a_threshold_are_always_accepted():
    p_NC = np.array([[0.1, 0.45, 0.45], [0.6, 0.2, 0.2]], dtype=np.float32)
    np.testing.assert_allclose(grade_confidence(p_NC, 1), [0.9, 0.4], rtol=1e-6)
    assert Thresholds.given(LABELS, {"middle": 0.8}, "middle").accept(p_NC).tolist() == [True, False]
    assert Thresholds.given(LABELS, {"low": 0.7}).accept(p_NC).tolist() == [True, False]


def test_a_threshold_that_was_given_is_measured_and_kept():
    p_NC = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0]], dtype=np.float32)
    start = Thresholds.given(LABELS, {"low": 0.7})
    thresholds, measured = fit(start, p_NC, np.array([1, 0, 1]), 0.9, ("low",))
    assert thresholds.threshold_C[0] == 0.7
    assert (measured["low"].given, measured["middle"].given) == (True, False)
    assert measured["low"].precision == 0.0  # kept, whatever it is worth


def test_a_precision_that_cannot_be_promised_is_said_with_the_gold_texts_that_it_takes():
    p_NC = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.3, 0.0]], dtype=np.float32)
    thresholds, measured = fit(ALL, p_NC, np.array([1, 0, 0]), 0.9, ())
    assert not thresholds.accept(p_NC).any()
    needed = fewest_texts(0.9, 0.05 / 3)
    assert 0.9**needed <= 0.05 / 3 / STARTS < 0.9 ** (needed - 1)
    said = describe("low", measured["low"], 0.9)
    assert f"(3 gold texts answered so, 2 are, 2 are both; at least {needed} of both are needed)" in said
    facts = json.loads(json.dumps(as_dict(thresholds, measured, 0.9, 0.05, 3), allow_nan=False))
    assert (facts["wanted_precision"], facts["delta"]) == (0.9, 0.05)
    assert (facts["labels"]["low"]["threshold"], facts["gold_texts"]) == (None, 3)


def test_a_reached_precision_is_said_with_interval_and_coverage():
    # Seven of eight right; Clopper and Pearson's interval by the beta distribution: 0.473 to 0.997.
    one = measure(0.5, np.full(8, 0.5), np.arange(8) > 0, 7, False)
    assert (one.precision_low, one.precision_high) == pytest.approx((0.47349, 0.99684), abs=1e-4)
    assert "precision 0.875 [0.473, 0.997], coverage 100.0%" in describe("x", one, 0.8)


def test_no_gold_is_refused():
    with pytest.raises(ValueError, match="no text"):
        fit(ALL, np.empty((0, 3)), np.empty(0, dtype=int), 0.9, ())
