from __future__ import annotations

import numpy as np
import pytest

from llkd_ray.metrics.calibration import at_temperature, batch_calibrate, fit_temperature
from llkd_ray.metrics.uncertainty import normalise


def answers(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose gold is drawn from them at temperature 1, sharpened."""
    rng = np.random.default_rng(seed)
    p_NC = normalise(np.exp(rng.normal(0, 1.5, (n, 4))))
    gold_N = np.array([rng.choice(4, p=p) for p in p_NC])
    return normalise(p_NC**sharpness), gold_N


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_sharpening(sharpness):
    p_NC, gold_N = answers(4000, sharpness)
    assert fit_temperature(p_NC, gold_N) == pytest.approx(sharpness, rel=0.1)


def test_a_temperature_needs_no_text_of_every_class():
    p_NC, gold_N = answers(300, 2.0)
    some = gold_N < 2
    assert fit_temperature(p_NC[some], gold_N[some]) > 0


def test_a_temperature_needs_gold():
    with pytest.raises(ValueError, match="gold_N is empty"):
        fit_temperature(np.full((0, 4), 0.25), np.empty(0, dtype=int))


def test_gold_that_a_server_did_not_name_does_not_decide_the_temperature():
    p_NC, gold_N = answers(2000, 1.0)
    unnamed = np.random.default_rng(2).random(2000) < 0.02
    cut_NC = p_NC.copy()
    cut_NC[unnamed, gold_N[unnamed]] = 0.0
    cut_NC = normalise(cut_NC)
    # It is 2.8 where an unnamed label counts as 1e-12.
    assert fit_temperature(cut_NC, gold_N) < 1.8


def test_at_temperature_keeps_order_and_sums():
    p_NC, _ = answers(100, 1.0)
    warm = at_temperature(p_NC, 2.0)
    np.testing.assert_allclose(warm.sum(axis=1), 1.0)
    np.testing.assert_array_equal(np.argsort(warm, axis=1), np.argsort(p_NC, axis=1))
    np.testing.assert_allclose(at_temperature(p_NC, 1.0), p_NC)
    assert warm.max() < p_NC.max()


def test_batch_calibration_takes_a_bias_away():
    rng = np.random.default_rng(1)
    fair = normalise(np.exp(rng.normal(0, 1, (2000, 3))))
    biased = normalise(fair * np.array([5.0, 1.0, 1.0]))
    assert np.bincount(biased.argmax(axis=1), minlength=3)[0] > 1200
    again = batch_calibrate(biased, biased.mean(axis=0))
    assert np.mean(again.argmax(axis=1) == fair.argmax(axis=1)) > 0.85
    np.testing.assert_allclose(batch_calibrate(biased, biased.mean(axis=0), strength=0.0), biased)
