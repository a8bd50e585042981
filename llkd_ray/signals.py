"""What a label distribution tells: pure numpy on ``p_NC`` (N texts, C classes).

Shapes in names: N texts, C classes, K sampled answers or grades.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def votes(answer_NK: Ints, n_classes: int) -> Floats:
    """float[N, C]: the share of K sampled answers for each label; -1 stands for no answer.

    Self-consistency (Wang et al., arXiv 2203.11171) without its reasoning paths: the share of the most
    frequent answer is a confidence that needs no access to probabilities. A text without any answer gets
    1/C everywhere.
    """
    answer_NK = np.asarray(answer_NK)
    return normalise((answer_NK[:, :, None] == np.arange(n_classes)).sum(axis=1))


def confidence(p_NC: Floats) -> Floats:
    """float[N]: probability of the most likely label. LLKD's teacher signal (arXiv 2411.08028, sec. 3)."""
    return np.max(p_NC, axis=1)


def least_confidence(p_NC: Floats) -> Floats:
    """float[N]: 1 - confidence, over its largest value 1 - 1/C, so 0 is certain and 1 is uniform.

    Lewis & Gale 1994, "A sequential algorithm for training text classifiers"; the scaling is ours.
    """
    return (1.0 - confidence(p_NC)) / (1.0 - 1.0 / p_NC.shape[1])


def margin(p_NC: Floats) -> Floats:
    """float[N]: the most likely label's probability less the second's; 0 is undecided, 1 is certain.

    Scheffer, Decomain & Wrobel 2001, "Active hidden Markov models for information extraction".
    """
    second_and_first_N2 = np.partition(p_NC, -2, axis=1)[:, -2:]
    return second_and_first_N2[:, 1] - second_and_first_N2[:, 0]


def entropy(p_NC: Floats) -> Floats:
    """float[N]: predictive entropy over log C, so 0 is certain and 1 is uniform.

    LLKD's student signal is the entropy (arXiv 2411.08028, sec. 3); dividing by log C is ours, so that
    it lies on the same scale whatever the number of classes.
    """
    p_NC = np.asarray(p_NC, dtype=np.float64)
    log_p_NC = np.log(p_NC, out=np.zeros_like(p_NC), where=p_NC > 0)
    return np.clip(-(p_NC * log_p_NC).sum(axis=1) / np.log(p_NC.shape[1]), 0.0, 1.0)


def support(p_NC: Floats, label_N: Ints) -> Floats:
    """float[N]: the probability that one model gives to the label that another one chose."""
    return p_NC[np.arange(label_N.size), label_N]


RANK_BITS = 12
"""Low bits of a float32 that a rank does without: 11 of the 23 behind the point remain."""
RANK_KEYS = (24 << 23 >> RANK_BITS) + 1
"""49,153 grades of confidence: doubts from 2**-24, the least that float32 tells from none, to 1."""
_MAX_COUNTS = 1 << 24


def rank_step(n_classes: int) -> int:
    """How many grades are taken as one, so that counts by class and grade take 128 MiB at most."""
    return 1 << max(0, (n_classes * RANK_KEYS - 1).bit_length() - _MAX_COUNTS.bit_length() + 1)


def confidence_grade(confidence_N: Floats) -> NDArray[np.int32]:
    """int32[N] in [0, 49,152]: the larger the surer, fine where a teacher is nearly certain.

    The upper bits of the doubt, 1 - confidence, as a float32: 2,048 grades from one power of two to the next.
    So .9999 and .99991 differ as much as .9 and .91 do. A teacher's confidences crowd near 1, and there the
    confidence's own upper bits would be all alike.
    """
    doubt_N = np.float32(1) - np.asarray(confidence_N, dtype=np.float32)
    bits_N = doubt_N.view(np.int32) - np.int32(103 << 23)  # those of 2**-24
    return np.int32(RANK_KEYS - 1) - np.clip(bits_N >> RANK_BITS, 0, RANK_KEYS - 1).astype(np.int32)


def mean_ranks(count_CK: Ints) -> Floats:
    """float64[C, K] in (0, 1]: the rank of a text within its class, from counts by class and ascending grade.

    The raw confidence of different labels cannot be compared: a label that the teacher over-uses looks the
    surest. Its rank within the label can. Texts of one grade share the mean of their ranks, so that the
    ranks of a class have the same mean whatever the ties. With the highest rank instead, a class of which
    the teacher is always equally sure would be the surest of all.
    """
    upto_CK = np.cumsum(count_CK, axis=1)
    return (upto_CK - (count_CK - 1) / 2) / np.maximum(upto_CK[:, -1:], 1)


def class_thresholds(sum_C: Ints | Floats, count_C: Ints) -> Floats:
    """float64[C]: a threshold for each pseudo-class, from a global mean and each class's own mean.

    Takes the sum of the signal and the number of texts of each pseudo-class. The form is FreeMatch's
    self-adaptive threshold (arXiv 2205.07246, eq. 8): the global value, scaled for each class by that
    class's value over the largest. Two deviations. Exact means over the texts at hand stand for the
    exponential moving averages, because between rounds all of them are known. And a class's value is the
    mean signal of the texts with that pseudo-label, so that the same form serves confidence and
    uncertainty. A class without texts gets the global mean.
    """
    global_mean = sum_C.sum() / max(count_C.sum(), 1)
    mean_C = sum_C / np.maximum(count_C, 1)
    largest = mean_C.max(initial=0.0)
    if largest <= 0:
        return np.full(count_C.size, global_mean)
    return np.where(count_C > 0, global_mean * mean_C / largest, global_mean)


@dataclass(frozen=True)
class MovingThreshold:
    """A threshold that follows a signal step by step: one moving average over all, one for each class.

    FreeMatch (arXiv 2205.07246, eq. 5 to 8): both start at 1/C, move by ``1 - momentum`` a step before
    the step is judged, and a class's threshold is the global one times the class's average over the
    largest class's. Deviation: a class's average is of the signal of its texts, as in
    :func:`class_thresholds`; a class that a step has no text of stays where it is.
    """

    overall: float
    class_C: Floats
    momentum: float = 0.999

    @classmethod
    def start(cls, n_classes: int, momentum: float = 0.999) -> MovingThreshold:
        return cls(1 / n_classes, np.full(n_classes, 1 / n_classes), momentum)

    def after(self, sum_C: Floats, count_C: Ints) -> MovingThreshold:
        """The threshold moved by a step's sums and counts per class, which add up over ranks."""
        if not count_C.sum():
            return self
        keep, move = self.momentum, 1 - self.momentum
        mean_C = np.where(count_C > 0, sum_C / np.maximum(count_C, 1), self.class_C)
        return MovingThreshold(
            keep * self.overall + move * float(sum_C.sum() / count_C.sum()),
            keep * self.class_C + move * mean_C,
            self.momentum,
        )

    def of_class(self) -> Floats:
        """float[C]: what a text of each class has to reach."""
        return self.overall * self.class_C / max(float(self.class_C.max()), 1e-12)
