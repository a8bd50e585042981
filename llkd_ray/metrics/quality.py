"""Quality metrics of a classifier, with confidence intervals.

Accuracy and macro-F1 compare with true labels (gold); agreement compares with the teacher, which may be
wrong.

All metrics are plain numbers for a JSON file; None means undefined, such as the precision of a label that is
never predicted. Calibration is that of the most likely label ("confidence calibration", Guo et al. 2017,
arXiv 1706.04599); log loss and Brier score evaluate the whole distribution.

Shapes in names: N texts, C classes, M confidence bins, R resamples, B resamples of one block, K distinct
pairs of true and predicted class. ``gold_N`` and ``predicted_N`` are int[N] in [0, C), ``p_NC`` is
float[N, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llkd_ray.metrics.calibration import Calibrator
from llkd_ray.metrics.uncertainty import Floats, Ints, confidence, normalise

BINS = 15
DECILES = 10
BLOCK = 4_000_000
"""Maximum number of draws that the bootstrap holds in memory at a time."""


@dataclass(frozen=True)
class Scores:
    """Metrics of a classifier against gold; all three are in [0, 1]."""

    accuracy: float
    macro_f1: float
    """Mean F1 of the classes that occur in gold or in the predictions."""
    ece: float
    """Expected calibration error; 0 is best."""


def classification(gold_N: np.ndarray, p_NC: np.ndarray, labels: int) -> Scores:
    """Score a classifier's predictions ``p_NC`` over ``labels`` classes; rows need not sum to one.

    Raises ValueError for empty input, for mismatched shapes, and for a true label outside [0, labels):
    remove texts without a true label (-1) first.
    """
    gold_N, p_NC = np.asarray(gold_N), np.asarray(p_NC)
    if p_NC.ndim != 2 or p_NC.shape[1] != labels:
        raise ValueError(f"p_NC has shape {p_NC.shape}: expected one row a text with {labels} columns")
    _check_pair(gold_N, p_NC, "gold_N", "p_NC")
    if gold_N.min() < 0 or gold_N.max() >= labels:
        raise ValueError(
            f"gold_N holds {gold_N.min()}..{gold_N.max()}, outside 0..{labels - 1}: "
            "leave out the texts whose true label is unknown"
        )
    from sklearn.metrics import accuracy_score, f1_score  # takes a second to import

    predicted_N = p_NC.argmax(axis=1)
    return Scores(
        accuracy=float(accuracy_score(gold_N, predicted_N)),
        macro_f1=float(f1_score(gold_N, predicted_N, average="macro", zero_division=0)),
        ece=expected_calibration_error(confidence(normalise(p_NC)), predicted_N == gold_N),
    )


def expected_calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = 15) -> float:
    """The difference between confidence and accuracy, averaged over equal-width bins weighted by size.

    Equations 3 and 5 of Guo et al. 2017 (arXiv 1706.04599), whose experiments use 15 bins: bin m
    (1..M) holds the texts with a confidence in ((m - 1)/M, m/M]; here the first bin also includes 0.
    """
    confidence_N, correct_N = np.asarray(confidence_N, dtype=float), np.asarray(correct_N, dtype=float)
    _check_pair(confidence_N, correct_N, "confidence_N", "correct_N")
    if bins < 1:
        raise ValueError(f"bins is {bins}: at least 1 is needed")
    if not (confidence_N.min() >= 0 and confidence_N.max() <= 1 + 1e-6):
        raise ValueError(f"confidence_N holds {confidence_N.min()}..{confidence_N.max()}, outside 0..1")
    bin_N = confidence_bins(confidence_N, bins)
    # |bin| / N × |accuracy - confidence| of a bin equals the absolute sum of its differences, divided by N.
    gap_M = np.bincount(bin_N, weights=correct_N - confidence_N, minlength=bins)
    return float(np.abs(gap_M).sum() / confidence_N.size)


def confidence_bins(confidence_N: np.ndarray, bins: int = 15) -> np.ndarray:
    """int[N] in [0, bins): each text's bin among equal-width confidence bins, closed on the right."""
    return np.clip(np.ceil(np.asarray(confidence_N) * bins).astype(int) - 1, 0, bins - 1)


def accuracy_interval(gold_N: np.ndarray, predicted_N: np.ndarray) -> tuple[float, float]:
    """The exact 95 % interval of the accuracy; see :func:`binomial_interval`."""
    _check_pair(gold_N, predicted_N, "gold_N", "predicted_N")
    low, high = binomial_interval(int((gold_N == predicted_N).sum()), len(gold_N))
    assert low is not None
    assert high is not None
    return low, high


def macro_f1_interval(
    gold_N: np.ndarray, predicted_N: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of macro-F1 over texts drawn with replacement.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Macro-F1 depends only on the
    counts of pairs of true and predicted class, so a resample is one multinomial draw of these counts: the
    same distribution as drawing N texts, with K numbers instead of N. If all answers are right, or all are
    wrong, every resample is the same; the interval is then that of the accuracy, which has the same value.
    """
    gold_N, predicted_N = np.asarray(gold_N), np.asarray(predicted_N)
    _check_pair(gold_N, predicted_N, "gold_N", "predicted_N")
    right_N = gold_N == predicted_N
    if right_N.all() or not right_N.any():
        return accuracy_interval(gold_N, predicted_N)
    pairs_K2, counts_K = np.unique(np.stack([gold_N, predicted_N], axis=1), axis=0, return_counts=True)
    drawn_RK = rng.multinomial(gold_N.size, counts_K / gold_N.size, size=resamples)
    low, high = np.quantile(_macro_f1(pairs_K2, drawn_RK), [0.025, 0.975])
    return float(low), float(high)


def binomial_interval(hits: int, texts: int, level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """Exact interval of a proportion (Clopper & Pearson 1934), with a coverage of at least ``level``.

    Both ends are None if there are no texts.
    """
    from scipy.stats import binomtest

    if not texts:
        return None, None
    interval = binomtest(hits, texts).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def _macro_f1(pairs_K2: np.ndarray, drawn_RK: np.ndarray) -> np.ndarray:
    """float[R]: macro-F1 of each resample, over the classes that occur in it."""
    classes_C, pair_class_K2 = np.unique(pairs_K2, return_inverse=True)
    one_hot_CC = np.eye(classes_C.size)
    is_gold_KC, is_predicted_KC = one_hot_CC[pair_class_K2.reshape(-1, 2).T]
    # F1 of a class is 2·hits / (count in gold + count in predictions).
    hits_RC = drawn_RK @ (is_gold_KC * is_predicted_KC)
    occurs_RC = drawn_RK @ (is_gold_KC + is_predicted_KC)
    f1_RC = 2 * hits_RC / np.maximum(occurs_RC, 1)
    return f1_RC.sum(axis=1) / (occurs_RC > 0).sum(axis=1)


def agreement(p_student_NC: np.ndarray, p_teacher_NC: np.ndarray) -> float:
    """Share of the texts on which student and teacher predict the same label."""
    p_student_NC, p_teacher_NC = np.asarray(p_student_NC), np.asarray(p_teacher_NC)
    if p_student_NC.ndim != 2 or p_student_NC.shape != p_teacher_NC.shape:
        raise ValueError(
            f"p_student_NC has shape {p_student_NC.shape} and p_teacher_NC {p_teacher_NC.shape}: "
            "both need the same texts and classes"
        )
    _check_pair(p_student_NC, p_teacher_NC, "p_student_NC", "p_teacher_NC")
    return float((p_student_NC.argmax(axis=1) == p_teacher_NC.argmax(axis=1)).mean())


def has_plateaued(value_K: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether none of the last ``patience`` values exceeds the best earlier value by ``min_gain``."""
    before, last = value_K[:-patience], value_K[-patience:]
    return bool(before) and max(last) < max(before) + min_gain


def by_falling_confidence(confidence_N: np.ndarray, parts: int) -> list[np.ndarray]:
    """int[N / parts] each: texts by descending confidence, in parts whose sizes differ by at most one."""
    order_N = np.argsort(-confidence_N, kind="stable")
    return np.array_split(order_N, min(parts, order_N.size))


def _check_pair(one_N: np.ndarray, other_N: np.ndarray, one: str, other: str) -> None:
    """Raise ValueError unless both arrays have the same non-zero number of texts and finite values."""
    if one_N.shape[:1] != other_N.shape[:1]:
        raise ValueError(f"{one} has {one_N.shape[:1]} texts and {other} {other_N.shape[:1]}: not the same")
    if not len(one_N):
        raise ValueError(f"{one} is empty: there is nothing to measure")
    for values, name in ((one_N, one), (other_N, other)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds a value that is not finite: has the model diverged?")


def quality_of(
    mass_NC: Floats, gold_N: Ints, calibrator: Calibrator, rng: np.random.Generator
) -> dict[str, Any] | None:
    """The teacher's quality before (``raw``) and after calibration, on texts with gold (not -1).

    None if no text has gold. Exclude texts whose gold was used to fit the calibrator: on them the
    calibration looks better than it is.
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
    """All quality metrics of a teacher's answers ``p_NC``; rows need not sum to one.

    - ``accuracy``, ``macro_f1``, ``ece``: as in :mod:`llkd_ray.metrics.quality`; ``ece_interval``: 95 %.
    - ``nll``: mean negative log-probability of gold, with the probability bounded below by 1e-12.
    - ``brier``: mean over texts of the summed squared differences to gold, 0 to 2 (Brier 1950, eq. 2).
    - ``auroc``: the probability that a correct answer has a higher confidence than a wrong one (Hendrycks &
      Gimpel 2017, arXiv 1610.02136); None if all answers are correct or all wrong.
    - ``by_decile``: tenths of the texts, the most confident first; ``reliability``: 15 equal-width confidence
      bins (DeGroot & Fienberg 1983); ``per_class``: metrics of each label, in the order of the labels.

    Raises ValueError for empty input, for mismatched shapes, and for gold outside [0, C).
    """
    gold_N, p_NC = np.asarray(gold_N), np.asarray(p_NC, dtype=np.float64)
    if p_NC.ndim != 2:
        raise ValueError(f"p_NC has shape {p_NC.shape}: expected one row a text")
    if (p_NC < 0).any():
        raise ValueError(f"p_NC holds {p_NC.min()}: a probability is not negative")
    from sklearn.metrics import roc_auc_score  # see classification

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
        "by_decile": [
            _part(confidence_N[i], correct_N[i]) for i in by_falling_confidence(confidence_N, DECILES)
        ],
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
    """Bootstrap interval of the expected calibration error, over texts drawn with replacement.

    The basic interval (Davison & Hinkley 1997, eq. 5.6): twice the estimate minus the quantiles of the
    resamples, never below 0. Random variation within the bins biases the estimate upwards, and the resamples
    have this bias twice, so their quantiles lie above the true value of a well-calibrated teacher at any
    number of texts; the basic interval corrects for it. For the same reason the estimate itself can lie above
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
    """Number of texts, accuracy and mean confidence of ``BINS`` equal-width confidence bins."""
    bin_N = confidence_bins(confidence_N, BINS)
    return [_part(confidence_N[bin_N == m], correct_N[bin_N == m]) for m in range(BINS)]


def _per_class(gold_N: Ints, predicted_N: Ints, confidence_N: Floats, n_classes: int) -> list[dict[str, Any]]:
    """Metrics of each label; compare precision with the mean confidence of texts predicted as the label."""
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
