"""What a label distribution tells: pure numpy on ``p_NC`` (N texts, C classes).

Shapes in names: N texts, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def normalise(mass_NC: Floats) -> Floats:
    """Probabilities over the labels from mass over a larger vocabulary; rows without mass get 1/C."""
    mass_NC = np.asarray(mass_NC, dtype=np.float64)
    total_N1 = mass_NC.sum(axis=1, keepdims=True)
    uniform = 1.0 / mass_NC.shape[1]
    return np.where(total_N1 > 0, mass_NC / np.where(total_N1 > 0, total_N1, 1.0), uniform)


def confidence(p_NC: Floats) -> Floats:
    """float[N]: probability of the most likely label. LLKD's teacher signal (arXiv 2411.08028, sec. 3)."""
    return np.max(p_NC, axis=1)


def entropy(p_NC: Floats) -> Floats:
    """float[N]: predictive entropy over log C, so 0 is certain and 1 is uniform.

    LLKD's student signal is the entropy (arXiv 2411.08028, sec. 3); dividing by log C is ours, so that
    it lies on the same scale whatever the number of classes.
    """
    p_NC = np.asarray(p_NC, dtype=np.float64)
    log_p_NC = np.log(p_NC, out=np.zeros_like(p_NC), where=p_NC > 0)
    return np.clip(-(p_NC * log_p_NC).sum(axis=1) / np.log(p_NC.shape[1]), 0.0, 1.0)


def class_thresholds(signal_N: Floats, label_N: Ints, n_classes: int) -> Floats:
    """float[C]: a threshold for each pseudo-class, from a global mean and each class's own mean.

    The form is FreeMatch's self-adaptive threshold (arXiv 2205.07246, eq. 8): the global value, scaled
    for each class by that class's value over the largest. Two deviations. Exact means over the texts at
    hand stand for the exponential moving averages, because between rounds all of them are known. And a
    class's value is the mean signal of the texts with that pseudo-label, so that the same form serves
    confidence and uncertainty. A class without texts gets the global mean.
    """
    global_mean = float(np.mean(signal_N)) if signal_N.size else 0.0
    count_C = np.bincount(label_N, minlength=n_classes)
    sum_C = np.bincount(label_N, weights=signal_N, minlength=n_classes)
    mean_C = np.where(count_C > 0, sum_C / np.maximum(count_C, 1), global_mean)
    largest = mean_C[count_C > 0].max(initial=0.0)
    if largest <= 0:
        return np.full(n_classes, global_mean)
    return np.where(count_C > 0, global_mean * mean_C / largest, global_mean)
