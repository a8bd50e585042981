"""Processing candidates chunk by chunk: statistics of all of them, then the best of them.

A policy judges a text by itself and by statistics of all candidates. So a choice takes two passes: counts
and sums, then the search for the largest values. Neither depends on how the rows are divided into chunks:
the sums are of integers, and the best are ordered by value and row. Only texts that may still be among the
best are sorted.

Shapes in names: N texts of a chunk, M kept, C classes, K grades of confidence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llkd_ray.metrics.uncertainty import Floats, Ints, RowRandom
from llkd_ray.selection.table import CHUNK, UNIT, Candidates, class_sums

NEVER = -np.inf
"""The value of a text that must not be chosen."""


def known(signal_N: Floats) -> Floats:
    """float64[N]: the student's signal, and 1, the maximum uncertainty, for a text without a score."""
    return np.where(np.isnan(signal_N), 1.0, signal_N.astype(np.float64))


@dataclass
class PoolStats:
    """Counts and sums over all candidates, as integers, so that their order does not matter."""

    count_C: NDArray[np.int64]
    confidence_C: NDArray[np.int64]
    """Sum of the teacher's confidence, in units of ``table.UNIT``; as in ``uncertainty_C``."""
    uncertainty_C: NDArray[np.int64]
    """Sum of the student's uncertainty, 1 for a text without a score."""
    n_scored: int = 0
    """Texts scored by the student."""
    grade_CK: NDArray[np.int64] | None = None
    """Texts by class and grade of confidence (:func:`confidence_grade`), where ranks are needed."""

    @classmethod
    def empty(cls, n_classes: int, with_ranks: bool) -> PoolStats:
        count_C, confidence_C, uncertainty_C = np.zeros((3, n_classes), dtype=np.int64)
        n_grades = (RANK_KEYS - 1) // rank_step(n_classes) + 1
        grade_CK = np.zeros((n_classes, n_grades), dtype=np.int64) if with_ranks else None
        return cls(count_C, confidence_C, uncertainty_C, 0, grade_CK)

    @classmethod
    def of(cls, chunks: Iterable[Candidates], with_ranks: bool) -> PoolStats:
        """Statistics of all candidates in one or more chunks."""
        stats = None
        for candidates in chunks:
            if stats is None:
                stats = cls.empty(candidates.n_classes, with_ranks)
            stats.add(candidates)
        assert stats is not None, "even no candidates are a chunk"
        return stats

    def add(self, candidates: Candidates) -> None:
        """Add these candidates."""
        label_N, n_classes = candidates.label_N, candidates.n_classes
        self.count_C += np.bincount(label_N, minlength=n_classes)
        self.confidence_C += class_sums(candidates.confidence_N, label_N, n_classes)
        self.uncertainty_C += class_sums(known(candidates.uncertainty_N), label_N, n_classes)
        self.n_scored += int(np.count_nonzero(~np.isnan(candidates.uncertainty_N)))
        if self.grade_CK is not None:
            np.add.at(self.grade_CK.reshape(-1), self.place_of_grade(candidates), 1)

    def place_of_grade(self, candidates: Candidates) -> Ints:
        """int64[N]: the flat index of each text's count in ``grade_CK``."""
        assert self.grade_CK is not None, "register the policy with ranks=True"
        grade_N = confidence_grade(candidates.confidence_N) // rank_step(candidates.n_classes)
        return candidates.label_N.astype(np.int64) * self.grade_CK.shape[1] + grade_N


@dataclass(frozen=True)
class Pool:
    """Statistics of all candidates and their random numbers, for a policy that judges a chunk."""

    stats: PoolStats
    draw: RowRandom

    @property
    def is_scored(self) -> bool:
        """Whether the student has scored any candidate."""
        return self.stats.n_scored > 0

    def random(self, candidates: Candidates) -> Floats:
        """float64[N] in [0, 1): a uniform random number of each text."""
        return self.draw(candidates.row_N)

    def rank(self, candidates: Candidates) -> Floats:
        """float64[N] in (0, 1]: the rank of the confidence within its pseudo-class, 1 for the largest.

        See :func:`mean_ranks`; only for policies that are registered with ``ranks=True``.
        """
        return self._rank_CK.reshape(-1).take(self.stats.place_of_grade(candidates))

    @cached_property
    def confidence_threshold_C(self) -> Floats:
        """float64[C]: see :func:`class_thresholds`."""
        return class_thresholds(self.stats.confidence_C * UNIT, self.stats.count_C)

    @cached_property
    def uncertainty_threshold_C(self) -> Floats:
        """float64[C]: see :func:`class_thresholds`."""
        return class_thresholds(self.stats.uncertainty_C * UNIT, self.stats.count_C)

    @cached_property
    def means(self) -> tuple[float, float]:
        """Mean confidence and mean uncertainty of all."""
        count = max(self.stats.count_C.sum(), 1)
        return self.stats.confidence_C.sum() * UNIT / count, self.stats.uncertainty_C.sum() * UNIT / count

    @cached_property
    def _rank_CK(self) -> Floats:
        assert self.stats.grade_CK is not None, "register the policy with ranks=True"
        return mean_ranks(self.stats.grade_CK)


@dataclass(frozen=True)
class Scored:
    """Some texts with their values and weights from a policy."""

    row_M: Ints
    label_M: Ints
    value_M: Floats
    weight_M: Floats

    def __len__(self) -> int:
        return int(self.row_M.size)

    def take(self, index_L: Ints) -> Scored:
        """The texts at these places, in this order."""
        return Scored(*(column[index_L] for column in vars(self).values()))


class TopK:
    """The ``n`` texts with the largest values, and for each class the ``share_C[c]`` with the largest values.

    Rows are added in ascending order, and ties go to the lower row. A text that can no longer be among the
    best is dropped immediately: its value must be above the lowest kept value.
    """

    def __init__(self, n: int, share_C: Ints | None = None) -> None:
        self.n, self.share_C = n, share_C
        none = np.empty(0, dtype=np.int64)
        self._parts = [Scored(none, none, np.empty(0), np.empty(0))]
        self._n_kept = self._n_waiting = 0
        # The lower bound of values to keep: one for all classes, or one for each.
        self._floor_C: Floats = np.full(1 if share_C is None else share_C.size, NEVER)

    def add(
        self, row_N: Ints, value_N: Floats, label_N: Ints | None = None, weight_N: Floats | None = None
    ) -> None:
        """Keep the texts that may be among the best; labels matter where classes have shares."""
        index_M = self._above_floor(value_N, label_N)
        if not index_M.size:
            return
        label_M = np.zeros(index_M.size, dtype=np.int64) if label_N is None else label_N[index_M]
        weight_M = np.ones(index_M.size) if weight_N is None else weight_N[index_M]
        self._parts.append(Scored(row_N[index_M], label_M, value_N[index_M], weight_M))
        self._n_waiting += index_M.size
        # Only once there is enough to drop, so that the work is proportional to the input.
        if self._n_waiting >= max(self._n_kept, CHUNK // 16):
            self._shrink()

    def best(self) -> Scored:
        """The choice, largest value first; see :func:`best`."""
        self._shrink()
        kept = self._parts[0]
        return kept.take(best(kept.value_M, kept.label_M, self.n, self.share_C))

    def _above_floor(self, value_N: Floats, label_N: Ints | None) -> Ints:
        """int64[M], ascending: the positions of the texts to keep for now."""
        is_above_N = value_N > float(self._floor_C.min())
        if self.share_C is None or label_N is None:
            return np.flatnonzero(is_above_N)
        # Where most are below the lowest floor, class floors are looked up only for the others. While a class
        # has less than its share, its floor is -inf, and this saves nothing.
        if np.count_nonzero(is_above_N) > value_N.size // 8:
            return np.flatnonzero(value_N > self._floor_C.take(label_N))
        index_M = np.flatnonzero(is_above_N)
        return index_M[value_N[index_M] > self._floor_C.take(label_N[index_M])]

    def _shrink(self) -> None:
        columns = zip(*(vars(part).values() for part in self._parts), strict=True)
        kept = Scored(*map(np.concatenate, columns))
        is_kept = np.zeros(len(kept), dtype=bool)
        is_kept[_among_largest(kept.value_M, self.n)] = True
        self._floor_C[:] = _floor(kept.value_M[is_kept], self.n)
        if self.share_C is not None:
            for c, of_class in _by_class(kept.label_M, self.share_C):
                share = int(self.share_C[c])
                best_of_class = of_class[_among_largest(kept.value_M[of_class], share)]
                is_kept[best_of_class] = True
                self._floor_C[c] = min(self._floor_C[c], _floor(kept.value_M[best_of_class], share))
            # A class with a share but no texts yet accepts any text.
            is_absent_C = np.bincount(kept.label_M, minlength=self.share_C.size) == 0
            self._floor_C[is_absent_C & (self.share_C > 0)] = NEVER
        self._parts = [kept.take(np.flatnonzero(is_kept))]
        self._n_kept, self._n_waiting = len(self._parts[0]), 0


def best(value_N: Floats, label_N: Ints, n: int, share_C: Ints | None = None) -> Ints:
    """int64[M]: the positions of the at most ``n`` largest values, largest first.

    With shares, which sum to at most ``n``, each class first fills its share; the rest goes to the largest
    values of any class. Ties go to the lower position.
    """
    allowed_N = np.flatnonzero(value_N > NEVER)
    if share_C is None:
        return allowed_N[largest(value_N[allowed_N], n)]
    is_taken_N = np.zeros(value_N.size, dtype=bool)
    for c, of_class in _by_class(label_N[allowed_N], share_C):
        places = allowed_N[of_class]
        is_taken_N[places[largest(value_N[places], int(share_C[c]))]] = True
    rest = allowed_N[~is_taken_N[allowed_N]]
    is_taken_N[rest[largest(value_N[rest], n - int(is_taken_N.sum()))]] = True
    chosen = np.flatnonzero(is_taken_N)
    return chosen[np.argsort(-value_N[chosen], kind="stable")]


def largest(value_N: Floats, n: int) -> Ints:
    """int64[M]: positions of the at most ``n`` largest, largest first, ties by position."""
    places = _among_largest(value_N, n)
    return places[np.argsort(-value_N[places], kind="stable")]


def _among_largest(value_N: Floats, n: int) -> Ints:
    """int64[M], ascending: positions of the at most ``n`` largest, the lower ones where there are ties."""
    if n <= 0:
        return np.empty(0, dtype=np.int64)
    if n >= value_N.size:
        return np.arange(value_N.size)
    worst = np.partition(value_N, value_N.size - n)[value_N.size - n]
    is_among_N = value_N > worst
    ties = np.flatnonzero(value_N == worst)
    is_among_N[ties[: n - np.count_nonzero(is_among_N)]] = True
    return np.flatnonzero(is_among_N)


def _by_class(label_N: Ints, share_C: Ints) -> Iterable[tuple[int, Ints]]:
    """The classes that have a share and texts, each with the positions of its texts, ascending."""
    # 16 bits, like labels in the table: numpy uses radix sort for these.
    order_N = np.argsort(label_N.astype(np.int16, copy=False), kind="stable")
    edges = np.searchsorted(label_N[order_N], np.arange(share_C.size + 1))
    for c in np.flatnonzero((share_C > 0) & (np.diff(edges) > 0)).tolist():
        yield c, order_N[edges[c] : edges[c + 1]]


def _floor(kept_M: Floats, n: int) -> float:
    """The bound above which a value is among the ``n`` largest, given the best so far."""
    if n <= 0:
        return np.inf
    return NEVER if kept_M.size < n else float(kept_M.min())


RANK_BITS = 12
"""Low bits of a float32 that a rank ignores: 11 of the 23 of the mantissa remain."""
RANK_KEYS = (24 << 23 >> RANK_BITS) + 1
"""49,153 grades of confidence: 1 - confidence from 2**-24, the smallest in float32, to 1."""
_MAX_COUNTS = 1 << 24


def rank_step(n_classes: int) -> int:
    """Number of grades merged into one, so that counts by class and grade take 128 MiB at most."""
    return 1 << max(0, (n_classes * RANK_KEYS - 1).bit_length() - _MAX_COUNTS.bit_length() + 1)


def confidence_grade(confidence_N: Floats) -> NDArray[np.int32]:
    """int32[N] in [0, 49,152]: larger means more confident; fine steps where a teacher is nearly certain.

    The upper bits of the doubt, 1 - confidence, as a float32: 2,048 grades between successive powers of two.
    So .9999 and .99991 differ as much as .9 and .91 do. A teacher's confidences cluster near 1, where the
    upper bits of the confidence itself would not differ.
    """
    doubt_N = np.float32(1) - np.asarray(confidence_N, dtype=np.float32)
    bits_N = doubt_N.view(np.int32) - np.int32(103 << 23)  # those of 2**-24
    return np.int32(RANK_KEYS - 1) - np.clip(bits_N >> RANK_BITS, 0, RANK_KEYS - 1).astype(np.int32)


def mean_ranks(count_CK: Ints) -> Floats:
    """float64[C, K] in (0, 1]: the rank of a text within its class, from counts by class and ascending grade.

    Raw confidences of different labels are not comparable: a label that the teacher over-uses gets the
    highest. Ranks within the label are. Texts of one grade share the mean of their ranks, so that the ranks
    of a class have the same mean regardless of ties. With the highest rank instead, a class with the same
    confidence everywhere would rank above all others.
    """
    upto_CK = np.cumsum(count_CK, axis=1)
    return (upto_CK - (count_CK - 1) / 2) / np.maximum(upto_CK[:, -1:], 1)


def class_thresholds(sum_C: Ints | Floats, count_C: Ints) -> Floats:
    """float64[C]: a threshold for each pseudo-class, from a global mean and each class's own mean.

    Takes the sum of the signal and the number of texts of each pseudo-class. The form is FreeMatch's
    self-adaptive threshold (arXiv 2205.07246, eq. 8): the global value, scaled for each class by that
    class's value over the largest. Two deviations. Exact means over the current texts replace the
    exponential moving averages, because between rounds all texts are known. And a class's value is the
    mean signal of the texts with that pseudo-label, so that the same form applies to confidence and
    uncertainty. A class without texts gets the global mean.
    """
    global_mean = sum_C.sum() / max(count_C.sum(), 1)
    mean_C = sum_C / np.maximum(count_C, 1)
    largest = mean_C.max(initial=0.0)
    if largest <= 0:
        return np.full(count_C.size, global_mean)
    return np.where(count_C > 0, global_mean * mean_C / largest, global_mean)
