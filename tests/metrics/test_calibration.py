import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llkd_ray.config.teacher import ConfidenceConfig
from llkd_ray.metrics.calibration import MIN_GOLD, Calibrator, MeanAnswer, at_temperature, fit_temperature
from llkd_ray.metrics.uncertainty import normalise

METHODS = ("raw", "batch", "temperature", "votes")


def answers(n=400, bias=(6.0, 1.0, 1.0, 1.0), sharpness=1.0, seed=0):
    """Mass over the labels, of which a part is missing, and gold drawn from what it says without bias."""
    rng = np.random.default_rng(seed)
    fair_NC = normalise(np.exp(rng.normal(0, 1.5, (n, 4))))
    gold_N = np.minimum((fair_NC.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1), 3)
    p_NC = normalise(fair_NC**sharpness * np.array(bias))
    return p_NC * rng.uniform(0.2, 1.0, (n, 1)), gold_N


def sharpened(n, sharpness):
    """Probabilities whose gold is drawn from them at temperature 1, sharpened."""
    mass_NC, gold_N = answers(n, np.ones(4), sharpness)
    return normalise(mass_NC), gold_N


def fit(method, mass_NC, gold_N, **options):
    return Calibrator.fit(ConfidenceConfig(method=method, **options), mass_NC, gold_N)


def test_a_temperature_needs_gold_but_no_text_of_every_class():
    p_NC, gold_N = sharpened(300, 2.0)
    some = gold_N < 2
    assert fit_temperature(p_NC[some], gold_N[some]) > 0
    with pytest.raises(ValueError, match="gold_N is empty"):
        fit_temperature(p_NC[:0], gold_N[:0])


def test_gold_that_a_server_did_not_name_does_not_decide_the_temperature():
    p_NC, gold_N = sharpened(2000, 1.0)
    unnamed = np.random.default_rng(2).random(2000) < 0.02
    cut_NC = p_NC.copy()
    cut_NC[unnamed, gold_N[unnamed]] = 0.0
    cut_NC = normalise(cut_NC)
    # It is 2.8 where an unnamed label counts as 1e-12.
    assert fit_temperature(cut_NC, gold_N) < 1.8


def test_at_temperature_keeps_order_and_sums():
    p_NC, _ = sharpened(100, 1.0)
    warm = at_temperature(p_NC, 2.0)
    np.testing.assert_allclose(warm.sum(axis=1), 1.0)
    np.testing.assert_array_equal(np.argsort(warm, axis=1), np.argsort(p_NC, axis=1))
    np.testing.assert_allclose(at_temperature(p_NC, 1.0), p_NC)
    assert warm.max() < p_NC.max()


masses = arrays(
    np.float64, st.tuples(st.integers(1, 12), st.just(4)), elements=st.just(0.0) | st.floats(1e-9, 1.0)
)


@pytest.mark.parametrize("method", METHODS)
@given(mass_NC=masses)
def test_what_comes_out_is_a_distribution_for_each_text_by_itself(method, mass_NC):
    calibrator = fit(method, *answers())
    p_NC = calibrator.apply(mass_NC)
    assert p_NC.shape == mass_NC.shape
    assert (p_NC >= 0).all()
    np.testing.assert_allclose(p_NC.sum(axis=1), 1.0)
    np.testing.assert_allclose(p_NC, np.concatenate([calibrator.apply(row[None]) for row in mass_NC]))
    np.testing.assert_allclose(p_NC[mass_NC.sum(axis=1) == 0], 0.25)


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrator_comes_back_from_json_unchanged(method):
    mass_NC, gold_N = answers()
    calibrator = fit(method, mass_NC, gold_N)
    again = Calibrator.from_dict(json.loads(json.dumps(calibrator.as_dict())))
    assert again == calibrator
    np.testing.assert_array_equal(again.apply(mass_NC), calibrator.apply(mass_NC))


@pytest.mark.parametrize("method", ["raw", "votes"])
def test_raw_and_votes_only_normalise_and_fit_nothing(method):
    mass_NC, gold_N = answers()
    calibrator = fit(method, mass_NC, gold_N)
    np.testing.assert_array_equal(calibrator.apply(mass_NC), normalise(mass_NC))
    assert calibrator == Calibrator(method)
    assert calibrator.fitted_on == 0
    assert fit(method, np.empty((0, 4)), np.empty(0, dtype=int)) == calibrator


def test_batch_takes_a_prompts_bias_off_later_texts():
    mass_NC, _ = answers(seed=1)
    calibrator = fit("batch", *answers(seed=0))
    assert calibrator.fitted_on == 400
    before, after = (
        np.bincount(p.argmax(axis=1), minlength=4) / 400 for p in (mass_NC, calibrator.apply(mass_NC))
    )
    assert before[0] > 0.6
    assert after[0] < 0.4


def test_batch_of_strength_zero_changes_nothing():
    mass_NC, gold_N = answers()
    calibrator = fit("batch", mass_NC, gold_N, strength=0.0)
    np.testing.assert_allclose(calibrator.apply(mass_NC), normalise(mass_NC))
    half = fit("batch", mass_NC, gold_N, strength=0.5)
    share_of_0 = [c.apply(mass_NC)[:, 0].mean() for c in (calibrator, half, fit("batch", mass_NC, gold_N))]
    assert share_of_0 == sorted(share_of_0, reverse=True)


def test_a_label_that_was_never_named_does_not_win_by_a_trace():
    mass_NC = np.tile([0.7, 0.3, 0.0], (300, 1))
    p_NC = fit("batch", mass_NC, np.full(300, -1)).apply(np.array([[0.7, 0.2999, 1e-4]]))
    assert p_NC.argmax() != 2


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_undoes_a_sharpening_and_keeps_the_answer(sharpness):
    mass_NC, gold_N = answers(4000, bias=np.ones(4), sharpness=sharpness)
    calibrator = fit("temperature", mass_NC, gold_N)
    assert calibrator.temperature == pytest.approx(sharpness, rel=0.1)
    assert calibrator.fitted_on == 4000
    p_NC = calibrator.apply(mass_NC)
    np.testing.assert_array_equal(p_NC.argmax(axis=1), mass_NC.argmax(axis=1))
    assert p_NC.max(axis=1).mean() == pytest.approx(np.mean(p_NC.argmax(axis=1) == gold_N), abs=0.02)


def test_temperature_looks_only_at_texts_with_gold():
    mass_NC, gold_N = answers(200, sharpness=2.0)
    known_N = np.arange(200) % 3 == 0
    some = fit("temperature", mass_NC, np.where(known_N, gold_N, -1))
    assert some == fit("temperature", mass_NC[known_N], gold_N[known_N])
    assert some.fitted_on == known_N.sum()


def test_too_little_gold_is_refused_with_its_number():
    mass_NC, gold_N = answers(100)
    gold_N[MIN_GOLD - 1 :] = -1
    with pytest.raises(ValueError, match=r"gold is known of 19 of the texts.*20 are needed"):
        fit("temperature", mass_NC, gold_N)


@pytest.mark.parametrize(
    ("mass_NC", "message"),
    [
        (np.zeros((3, 4)), "'batch', but the teacher has given no answer"),
        (np.ones((2, 4)), "for each of 3 texts"),
        (np.ones(3), "for each of 3 texts"),
        (np.full((3, 4), np.nan), "no probabilities"),
        (np.full((3, 4), -0.1), "no probabilities"),
    ],
)
def test_answers_that_are_none_are_refused(mass_NC, message):
    with pytest.raises(ValueError, match=message):
        fit("batch", mass_NC, np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="has 3 columns, but the calibrator was fitted to 4 labels"):
        fit("batch", *answers(20)).apply(np.ones((2, 3)))


@given(mass_NC=masses, cut=st.integers(0, 12))
def test_the_mean_does_not_depend_on_the_order_of_the_texts(mass_NC, cut):
    whole = MeanAnswer.of(mass_NC)
    turned = MeanAnswer.of(np.concatenate([mass_NC[cut:], mass_NC[:cut]]))
    assert turned.texts == whole.texts == np.count_nonzero(mass_NC.sum(axis=1))
    np.testing.assert_allclose(turned.mean(), whole.mean())
    assert whole.mean().sum() == pytest.approx(1.0)
    assert (whole.mean() > 0).all()


def test_the_mean_of_many_is_that_of_their_distributions():
    mass_NC, _ = answers(2000)
    np.testing.assert_allclose(MeanAnswer.of(mass_NC).mean(), normalise(mass_NC).mean(axis=0), atol=1e-3)
