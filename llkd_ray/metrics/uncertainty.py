"""Uncertainty of label distributions ``p_NC``, and random numbers by row. Pure numpy.

Random numbers by row do not depend on how many were drawn before, unlike those of a stream, so decisions are
the same for any division of the rows into chunks.

Shapes in names: N texts or rows, M scored texts, L selected indices, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Mask = NDArray[np.bool_]


def normalise(mass_NC: Floats) -> Floats:
    """Normalise mass over a larger vocabulary to probabilities over the labels; rows without mass get 1/C."""
    mass_NC = np.asarray(mass_NC, dtype=np.float64)
    total_N1 = mass_NC.sum(axis=1, keepdims=True)
    uniform = 1.0 / mass_NC.shape[1]
    return np.where(total_N1 > 0, mass_NC / np.where(total_N1 > 0, total_N1, 1.0), uniform)


def confidence(p_NC: Floats) -> Floats:
    """float[N]: probability of the most likely label; LLKD's teacher signal (arXiv 2411.08028, sec. 3)."""
    return np.max(p_NC, axis=1)


def margin(p_NC: Floats) -> Floats:
    """float[N]: the highest minus the second-highest probability; 0 is undecided, 1 is certain.

    Scheffer, Decomain & Wrobel 2001, "Active hidden Markov models for information extraction".
    """
    second_and_first_N2 = np.partition(p_NC, -2, axis=1)[:, -2:]
    return second_and_first_N2[:, 1] - second_and_first_N2[:, 0]


def entropy(p_NC: Floats) -> Floats:
    """float[N]: predictive entropy divided by log C, so 0 is certain and 1 is uniform.

    LLKD's student signal is the entropy (arXiv 2411.08028, sec. 3); the division by log C is our addition, so
    that the scale does not depend on the number of classes.
    """
    p_NC = np.asarray(p_NC, dtype=np.float64)
    log_p_NC = np.log(p_NC, out=np.zeros_like(p_NC), where=p_NC > 0)
    return np.clip(-(p_NC * log_p_NC).sum(axis=1) / np.log(p_NC.shape[1]), 0.0, 1.0)


def support(p_NC: Floats, label_N: Ints) -> Floats:
    """float[N]: the probability that one model assigns to the label predicted by another."""
    return p_NC[np.arange(label_N.size), label_N]


@dataclass(frozen=True)
class StudentScores:
    """The student's scores of some texts: the three numbers per text that policies use."""

    label_M: Ints
    """The pseudo-labels that ``support_M`` refers to; negative if there was none."""
    uncertainty_M: Floats
    margin_M: Floats
    support_M: Floats
    """The probability of ``label_M``; nan if there was no pseudo-label."""

    @classmethod
    def of(cls, p_MC: Floats, label_M: Ints) -> StudentScores:
        """From the student's predictions and the pseudo-labels of the same texts."""
        support_M = np.where(label_M < 0, np.nan, support(p_MC, label_M))
        return cls(label_M, entropy(p_MC), margin(p_MC), support_M)

    def take(self, index_L: Ints | Mask) -> StudentScores:
        """The scores at the given indices, in that order."""
        return StudentScores(*(column[index_L] for column in vars(self).values()))


@dataclass(frozen=True)
class RowRandom:
    """Uniform random numbers, one for each row."""

    key: int
    """In [0, 2**64)."""

    @classmethod
    def from_rng(cls, rng: np.random.Generator) -> RowRandom:
        """A new instance with a key drawn from ``rng``."""
        return cls(int(rng.integers(2**63)))

    def __call__(self, row_N: Ints) -> Floats:
        """float64[N] in [0, 1)."""
        return hash_uniform(self.key, row_N)


def hash_uniform(seed: int, row_N: Ints) -> Floats:
    """float64[N] in [0, 1): a pseudo-random number per row that depends only on seed and row.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014), applied to the row's index in the seed's sequence.
    """
    with np.errstate(over="ignore"):
        x_N = (row_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x_N += np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_N ^= x_N >> np.uint64(31)
    return (x_N >> np.uint64(11)).astype(np.float64) / 2.0**53
