"""Making a teacher's probabilities comparable: batch calibration without gold, a temperature with gold.

Shapes in names: N texts, C classes.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from llkd_ray.signals import Floats, Ints, normalise


def batch_calibrate(p_NC: Floats, strength: float = 1.0) -> Floats:
    """float[N, C]: probabilities divided by their mean over the texts, to the power ``strength``.

    Batch Calibration (arXiv 2309.17249, eq. 3, in log space): what a prompt makes a label likely by,
    whatever the text, is estimated by the mean over a batch of texts, here all. It takes the classes for
    equally frequent where ``strength`` is 1; 0 changes nothing.
    """
    prior_C = np.maximum(p_NC.mean(axis=0), 1e-12)
    return normalise(p_NC / prior_C**strength)


def fit_temperature(p_NC: Floats, gold_N: Ints) -> float:
    """The temperature at which the probabilities fit gold best, by log loss; between 0.05 and 20.

    Guo et al. 2017 (arXiv 1706.04599, sec. 4.2). The order of a text's labels stays; above 1 the teacher
    was over-confident. Raises ValueError where there is no gold.
    """
    if not gold_N.size:
        raise ValueError("gold_N is empty: a temperature needs texts with gold")
    classes = np.arange(p_NC.shape[1])
    fit = minimize_scalar(
        lambda log_t: log_loss(gold_N, at_temperature(p_NC, np.exp(log_t)), labels=classes),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
    )
    return float(np.exp(fit.x))


def at_temperature(p_NC: Floats, temperature: float) -> Floats:
    """float[N, C]: the probabilities with their logarithms divided by a temperature."""
    log_NC = _log(p_NC) / temperature
    return normalise(np.exp(log_NC - log_NC.max(axis=1, keepdims=True)))


def _log(p_NC: Floats) -> Floats:
    return np.log(np.maximum(p_NC, 1e-12))
