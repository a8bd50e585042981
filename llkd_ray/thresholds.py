"""From which confidence on an answer is accepted: fitted to a wanted precision on gold, class by class. Pure.

An answer is a label and its confidence. With ``at_least`` the labels are grades, in the model's order, and
there is one question only: is the text of this grade or a higher one? Its confidence is the probability of
those grades together.

Legend: N texts, C classes, M texts of the one class (or question) in hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_curve

from llkd_ray.signals import Floats, Ints, confidence

INTERVAL = 0.95
"""Level of the intervals; Clopper and Pearson's, which never claim too much."""
ALWAYS, NEVER = 0.0, np.inf


@dataclass(frozen=True)
class Measured:
    """One threshold, and what it comes to on the gold texts that the model answers with this label."""

    threshold: float | None
    """None: no threshold reaches the precision that is wanted, so nothing is accepted."""
    given: bool
    """Whether the user gave it, instead of a fit."""
    gold_texts: int
    """Texts with this label in gold."""
    answered: int
    """Texts that the model answers with this label; all texts, with ``at_least``."""
    accepted: int
    right: int
    """Of those accepted."""
    precision: float | None
    """right / accepted; None where nothing is accepted."""
    precision_low: float | None
    precision_high: float | None
    """Ends of the interval of ``INTERVAL``. The fit has seen the same texts, so both are a little high."""
    coverage: float
    """accepted / answered."""
    recall: float
    """right / gold_texts."""
    best_precision: float | None
    """The highest of all thresholds; it says how far away an unreachable one is."""


@dataclass(frozen=True)
class Thresholds:
    """What is accepted. Without any threshold, everything."""

    labels: tuple[str, ...]
    threshold_C: tuple[float, ...]
    """ALWAYS and NEVER among them; with ``at_least`` the one for it is all that counts."""
    at_least: int | None = None
    """Index of the lowest grade that is wanted."""

    @classmethod
    def given(
        cls, labels: Sequence[str], by_label: Mapping[str, float], at_least: str | None = None
    ) -> Thresholds:
        """From thresholds by label; a label without one is always accepted."""
        grade = None if at_least is None else list(labels).index(at_least)
        return cls(tuple(labels), tuple(by_label.get(name, ALWAYS) for name in labels), grade)

    def accept(self, p_NC: Floats) -> np.ndarray:
        """bool[N]: whether each answer is accepted."""
        if self.at_least is not None:
            return grade_confidence(p_NC, self.at_least) >= self.threshold_C[self.at_least]
        return confidence(p_NC) >= np.array(self.threshold_C)[p_NC.argmax(axis=1)]


def grade_confidence(p_NC: Floats, grade: int) -> Floats:
    """float64[N]: probability that a text is of this grade or of a higher one."""
    return np.asarray(p_NC, dtype=np.float64)[:, grade:].sum(axis=1)


def fit(
    thresholds: Thresholds, p_NC: Floats, gold_N: Ints, wanted: float | None, given: Sequence[str]
) -> tuple[Thresholds, dict[str, Measured]]:
    """The lowest thresholds whose precision on gold is ``wanted``, and what they come to, by label.

    Labels in ``given`` keep their threshold and are only measured, as are all without ``wanted``. Raises
    ValueError where gold holds no text.
    """
    gold_N, p_NC = np.asarray(gold_N), np.asarray(p_NC)
    if not gold_N.size:
        raise ValueError("gold holds no text: there is nothing to fit thresholds to")
    labels, found_C, measured = thresholds.labels, list(thresholds.threshold_C), {}
    grade = thresholds.at_least
    for c in range(len(labels)) if grade is None else [grade]:
        answered_N = p_NC.argmax(axis=1) == c if grade is None else np.ones(gold_N.size, dtype=bool)
        is_gold_N = gold_N == c if grade is None else gold_N >= c
        confidence_N = confidence(p_NC) if grade is None else grade_confidence(p_NC, c)
        confidence_M, is_right_M = confidence_N[answered_N], is_gold_N[answered_N]
        n_gold = int(is_gold_N.sum())
        is_given = wanted is None or labels[c] in given
        if not is_given:
            assert wanted is not None
            found_C[c] = lowest_threshold(confidence_M, is_right_M, wanted)
        measured[labels[c]] = measure(found_C[c], confidence_M, is_right_M, n_gold, is_given)
    return Thresholds(labels, tuple(found_C), thresholds.at_least), measured


def lowest_threshold(confidence_M: Floats, is_right_M: np.ndarray, wanted: float) -> float:
    """The lowest confidence from which on at least a share ``wanted`` is right; NEVER where there is none."""
    if not np.any(is_right_M):
        return NEVER
    precision_T, _, threshold_T = precision_recall_curve(is_right_M, confidence_M)
    # The curve's last point, precision 1 of nothing, has no threshold.
    reached = np.flatnonzero(precision_T[:-1] >= wanted)
    return float(threshold_T[reached[0]]) if reached.size else NEVER


def measure(
    threshold: float, confidence_M: Floats, is_right_M: np.ndarray, n_gold: int, is_given: bool
) -> Measured:
    """What a threshold comes to; see :class:`Measured`."""
    accepted_M = np.asarray(confidence_M) >= threshold
    accepted, right = int(accepted_M.sum()), int(np.asarray(is_right_M)[accepted_M].sum())
    low = high = best = None
    if accepted:
        interval = binomtest(right, accepted).proportion_ci(INTERVAL, method="exact")
        low, high = float(interval.low), float(interval.high)
    if np.any(is_right_M):
        best = float(precision_recall_curve(is_right_M, confidence_M)[0][:-1].max())
    elif accepted_M.size:
        best = 0.0
    return Measured(
        threshold=None if threshold == NEVER else threshold,
        given=is_given,
        gold_texts=n_gold,
        answered=accepted_M.size,
        accepted=accepted,
        right=right,
        precision=right / accepted if accepted else None,
        precision_low=low,
        precision_high=high,
        coverage=accepted / accepted_M.size if accepted_M.size else 0.0,
        recall=right / n_gold if n_gold else 0.0,
        best_precision=best,
    )


def as_dict(
    thresholds: Thresholds, measured: Mapping[str, Measured], wanted: float | None, n_gold: int
) -> dict[str, Any]:
    """For thresholds.json."""
    at_least = None if thresholds.at_least is None else thresholds.labels[thresholds.at_least]
    return {
        "wanted_precision": wanted,
        "at_least": at_least,
        "gold_texts": n_gold,
        "interval": INTERVAL,
        "labels": {label: asdict(one) for label, one in measured.items()},
    }


def in_words(label: str, one: Measured, wanted: float | None) -> str:
    """One line for people."""
    known = f"{one.answered:,} gold texts answered so, {one.gold_texts:,} are"
    if one.threshold is None:
        best = "no answer is right" if not one.best_precision else f"the best is {one.best_precision:.3f}"
        if not one.answered:
            best = "the model never answers it"
        return (
            f"{label}: precision {wanted:g} cannot be reached on gold ({best}; {known}): nothing is accepted"
        )
    if one.precision is None:
        return f"{label}: from {one.threshold:.4f} on nothing in gold is accepted ({known})"
    return (
        f"{label}: from {one.threshold:.4f} on precision {one.precision:.3f} "
        f"[{one.precision_low:.3f}, {one.precision_high:.3f}], coverage {one.coverage:.1%} ({known})"
    )
