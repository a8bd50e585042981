"""Making probabilities comparable: batch calibration without gold, a temperature with gold.

Shapes in names: N texts, C classes.
"""

from __future__ import annotations

import numpy as np

from llkd_ray.signals import Floats, Ints, normalise

CALIBRATION_KEY = "llkd_calibration"
"""In a student's config.json: the temperature of its answers, and how it was had."""
NAMED = 1e-6
"""What a label's probability is taken for at least, under a temperature.

Servers that name their 20 likeliest tokens say nothing of the others, which are recorded as 0 and stand just
below the smallest named, about 1e-6. Taken for 1e-12, the few texts whose gold is not named alone decide the
temperature, and make it far too high.
"""


def batch_calibrate(p_NC: Floats, mean_C: Floats, strength: float = 1.0) -> Floats:
    """float[N, C]: probabilities divided by a mean answer, to the power ``strength``.

    Batch Calibration (arXiv 2309.17249, eq. 3, in log space): what a prompt makes a label likely by,
    whatever the text, is estimated by the mean over a batch of texts. It takes the classes for equally
    frequent where ``strength`` is 1; 0 changes nothing.
    """
    return normalise(p_NC / np.maximum(mean_C, 1e-12) ** strength)


def fit_temperature(p_NC: Floats, gold_N: Ints) -> float:
    """The temperature at which the probabilities fit gold best, by log loss; between 0.05 and 20.

    Guo et al. 2017 (arXiv 1706.04599, sec. 4.2). The order of a text's labels stays; above 1 they
    were over-confident. Raises ValueError where there is no gold.

    scikit-learn 1.8 does the same, but only around an estimator that computes the probabilities itself and
    for the classes that its sample has; this takes probabilities that are there, of labels without gold, too.
    """
    if not gold_N.size:
        raise ValueError("gold_N is empty: a temperature needs texts with gold")
    # A second to import, which every process of a run would wait for and one needs.
    from scipy.optimize import minimize_scalar
    from sklearn.metrics import log_loss

    classes = np.arange(p_NC.shape[1])
    fit = minimize_scalar(
        lambda log_t: log_loss(gold_N, at_temperature(p_NC, np.exp(log_t)), labels=classes),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
    )
    return float(np.exp(fit.x))


def cross_fitted(p_NC: Floats, gold_N: Ints, rng: np.random.Generator, folds: int = 5) -> Floats:
    """float[N, C]: each text at the temperature that the other folds ask for, so that none judges itself."""
    fold_N = rng.permutation(gold_N.size) % folds
    warm_NC = np.empty_like(p_NC)
    for fold in np.unique(fold_N):
        is_in = fold_N == fold
        warm_NC[is_in] = at_temperature(p_NC[is_in], fit_temperature(p_NC[~is_in], gold_N[~is_in]))
    return warm_NC


def at_temperature(p_NC: Floats, temperature: float) -> Floats:
    """float[N, C]: the probabilities with their logarithms divided by a temperature."""
    log_NC = np.log(np.maximum(p_NC, NAMED)) / temperature
    return normalise(np.exp(log_NC - log_NC.max(axis=1, keepdims=True)))
