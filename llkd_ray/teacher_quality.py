"""How far a teacher can be relied on where gold is known, and how well it knows that itself.

All figures are plain numbers for a JSON file; None stands for what cannot be known, such as the precision of
a label that is never answered. Calibration is asked of the answer given, the likeliest label ("confidence
calibration", Guo et al. 2017, arXiv 1706.04599); log loss and Brier score judge the whole distribution.

Legend: N texts, C classes, M bins of confidence, R resamples, B resamples of one block. ``gold_N`` is int[N]
in [0, C), ``p_NC`` float[N, C].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llkd_ray.confidence import Calibrator
from llkd_ray.evaluate import (
    classification,
    confidence_bins,
    expected_calibration_error,
    surest_first,
)
from llkd_ray.signals import Floats, Ints, confidence, normalise

BINS = 15
DECILES = 10
BLOCK = 4_000_000
"""Draws held in memory at a time by the bootstrap."""


def quality_of(
    mass_NC: Floats, gold_N: Ints, calibrator: Calibrator, rng: np.random.Generator
) -> dict[str, Any] | None:
    """The teacher as it answers (``raw``) and as it is used, on the texts whose gold is known (not -1).

    None where gold is known of no text. Leave out the texts that the calibrator was fitted on with their
    gold: on them it looks better than it is.
    """
    mass_NC, gold_N = np.asarray(mass_NC), np.asarray(gold_N)
    known_N = gold_N >= 0
    if not known_N.any():
        return None
    mass_NC, gold_N = mass_NC[known_N], gold_N[known_N]
    return {
        "method": calibrator.method,
        "fitted_on": calibrator.fitted_on or None,
        "raw": teacher_quality(gold_N, normalise(mass_NC), rng),
        "used": teacher_quality(gold_N, calibrator.apply(mass_NC), rng),
    }


def teacher_quality(
    gold_N: Ints, p_NC: Floats, rng: np.random.Generator, resamples: int = 1000
) -> dict[str, Any]:
    """All figures of a teacher's answers ``p_NC``; rows need not sum to one.

    - ``accuracy``, ``macro_f1``, ``ece``: as in :mod:`llkd_ray.evaluate`; ``ece_interval``: 95 %.
    - ``nll``: mean of minus the logarithm of gold's probability, which counts as 1e-12 at least.
    - ``brier``: mean over texts of the summed squared differences to gold, 0 to 2 (Brier 1950, eq. 2).
    - ``auroc``: the chance that of a right and a wrong answer the right one is the surer (Hendrycks & Gimpel
      2017, arXiv 1610.02136); None where all are right or all wrong.
    - ``by_decile``: tenths of the texts, the surest first; ``reliability``: 15 equal bins of confidence
      (DeGroot & Fienberg 1983); ``per_class``: each label's figures, in the order of the labels.

    Raises ValueError on empty input, on shapes that do not fit, and on gold outside [0, C).
    """
    gold_N, p_NC = np.asarray(gold_N), np.asarray(p_NC, dtype=np.float64)
    if p_NC.ndim != 2:
        raise ValueError(f"p_NC has shape {p_NC.shape}: expected one row a text")
    if (p_NC < 0).any():
        raise ValueError(f"p_NC holds {p_NC.min()}: a probability is not negative")
    from sklearn.metrics import roc_auc_score  # see evaluate.classification

    scores = classification(gold_N, p_NC, p_NC.shape[1])
    p_NC = normalise(p_NC)
    confidence_N, predicted_N = confidence(p_NC), p_NC.argmax(axis=1)
    correct_N = predicted_N == gold_N
    p_gold_N = p_NC[np.arange(gold_N.size), gold_N]
    one_sided = correct_N.all() or not correct_N.any()
    return {
        "texts": int(gold_N.size),
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "ece": scores.ece,
        "ece_interval": list(ece_interval(confidence_N, correct_N, rng, resamples)),
        "nll": float(-np.log(np.maximum(p_gold_N, 1e-12)).mean()),
        "brier": float(np.square(p_NC - np.eye(p_NC.shape[1])[gold_N]).sum(axis=1).mean()),
        "auroc": None if one_sided else float(roc_auc_score(correct_N, confidence_N)),
        "by_decile": [_part(confidence_N[i], correct_N[i]) for i in surest_first(confidence_N, DECILES)],
        "reliability": reliability(confidence_N, correct_N),
        "per_class": _per_class(gold_N, predicted_N, confidence_N, p_NC.shape[1]),
    }


def ece_interval(
    confidence_N: Floats,
    correct_N: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of the expected calibration error, over texts drawn anew with replacement.

    The basic interval (Davison & Hinkley 1997, eq. 5.6): twice the estimate less the resamples' quantiles,
    never below 0. The estimate is too high by what chance does to the bins, and resamples are too high by it
    once more, so their own quantiles lie above the true value of a teacher that is well calibrated, at any
    number of texts; the basic interval takes that off. For the same reason the estimate itself can lie above
    the interval.
    """
    bin_N = confidence_bins(confidence_N, BINS).astype(np.int32)
    gap_N = np.asarray(correct_N, dtype=float) - confidence_N
    texts = gap_N.size

    blocks = []
    per_block = max(1, BLOCK // texts)
    for start in range(0, resamples, per_block):
        drawn_BN = rng.integers(0, texts, (min(per_block, resamples - start), texts), dtype=np.int32)
        size = len(drawn_BN)
        cell_BN = bin_N[drawn_BN] + BINS * np.arange(size, dtype=np.int32)[:, None]
        gap_BM = np.bincount(cell_BN.ravel(), weights=gap_N[drawn_BN].ravel(), minlength=size * BINS)
        blocks.append(np.abs(gap_BM.reshape(size, BINS)).sum(axis=1) / texts)
    estimate = expected_calibration_error(confidence_N, correct_N, BINS)
    low, high = np.quantile(np.concatenate(blocks), [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, 2 * estimate - float(high)), max(0.0, 2 * estimate - float(low))


def _part(confidence_N: Floats, correct_N: np.ndarray) -> dict[str, Any]:
    return {
        "texts": int(confidence_N.size),
        "accuracy": float(correct_N.mean()) if correct_N.size else None,
        "confidence": float(confidence_N.mean()) if confidence_N.size else None,
    }


def reliability(confidence_N: Floats, correct_N: np.ndarray) -> list[dict[str, Any]]:
    """Texts, accuracy and mean confidence of ``BINS`` equal bins of confidence."""
    bin_N = confidence_bins(confidence_N, BINS)
    return [_part(confidence_N[bin_N == m], correct_N[bin_N == m]) for m in range(BINS)]


def _per_class(gold_N: Ints, predicted_N: Ints, confidence_N: Floats, n_classes: int) -> list[dict[str, Any]]:
    """Precision is the accuracy where the label is answered, to be held against the confidence there."""
    from sklearn.metrics import precision_recall_fscore_support

    precision_C, recall_C, f1_C, gold_C = precision_recall_fscore_support(
        gold_N, predicted_N, labels=np.arange(n_classes), zero_division=0.0
    )
    predicted_C = np.bincount(predicted_N, minlength=n_classes)
    confidence_C = np.bincount(predicted_N, weights=confidence_N, minlength=n_classes)
    return [
        {
            "gold": int(gold_C[c]),
            "predicted": int(predicted_C[c]),
            "precision": float(precision_C[c]) if predicted_C[c] else None,
            "recall": float(recall_C[c]) if gold_C[c] else None,
            "f1": float(f1_C[c]) if gold_C[c] or predicted_C[c] else None,
            "confidence": float(confidence_C[c] / predicted_C[c]) if predicted_C[c] else None,
        }
        for c in range(n_classes)
    ]
