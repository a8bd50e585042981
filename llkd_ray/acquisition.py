"""Acquisition: which unread texts the teacher reads next, from what the student thinks of them.

A policy gives every unread text a value, from columns, the run's seed and a random generator; those of
largest value are read, next to a share that is drawn at random for exploration. Shapes in names: N unread
texts, M chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llkd_ray.policies import best
from llkd_ray.signals import Floats, Ints
from llkd_ray.table import Unread

AcquisitionRule = Callable[[Unread, int, np.random.Generator], Floats]


@dataclass(frozen=True)
class AcquisitionPolicy:
    """An acquisition rule and what it needs."""

    rule: AcquisitionRule
    uses_student: bool
    """Whether the student must score the unread texts first."""
    explores: bool = True
    """Whether a share of what is read is drawn at random."""

    def choose(
        self, unread: Unread, n: int, rng: np.random.Generator, *, seed: int = 0, explore: float = 0.0
    ) -> Ints:
        """int64[M]: at most ``n`` rows, ascending, because neighbours are cheap to read together.

        A share ``explore`` of them is drawn at random from all unread texts, so that what the student is
        wrongly sure of is seen, too; the rest are those of largest value.
        """
        n = min(n, len(unread))
        explored = rng.choice(len(unread), size=round(explore * n) if self.explores else 0, replace=False)
        value_N = np.array(self.rule(unread, seed, rng), dtype=np.float64)
        value_N[explored] = np.inf
        return np.sort(unread.row_N[best(value_N, np.zeros(len(unread), dtype=np.int64), n)])


ACQUISITION: dict[str, AcquisitionPolicy] = {}


def acquisition_policy(
    name: str, *, uses_student: bool, explores: bool = True
) -> Callable[[AcquisitionRule], AcquisitionRule]:
    """Register a rule ``(unread, seed, rng) -> value_N``; no value may be ``-inf``."""

    def register(rule: AcquisitionRule) -> AcquisitionRule:
        ACQUISITION[name] = AcquisitionPolicy(rule, uses_student, explores)
        return rule

    return register


@acquisition_policy("sequential", uses_student=False, explores=False)
def value_sequential(unread: Unread, seed: int, rng: np.random.Generator) -> Floats:
    """In corpus order, all of it: ``acquisition.explore`` does not apply."""
    return -unread.row_N.astype(np.float64)


@acquisition_policy("random", uses_student=False)
def value_random(unread: Unread, seed: int, rng: np.random.Generator) -> Floats:
    """Uniformly at random."""
    return rng.random(len(unread))


@acquisition_policy("entropy", uses_student=True)
def value_entropy(unread: Unread, seed: int, rng: np.random.Generator) -> Floats:
    """Where the student's entropy is largest; what it never scored comes first, at random."""
    return _known(unread.uncertainty_N, rng)


@acquisition_policy("margin", uses_student=True)
def value_margin(unread: Unread, seed: int, rng: np.random.Generator) -> Floats:
    """Where the student's two best labels are closest; what it never scored comes first, at random."""
    return _known(1.0 - unread.margin_N.astype(np.float64), rng)


@acquisition_policy("m_raru", uses_student=True)
def value_m_raru(unread: Unread, seed: int, rng: np.random.Generator) -> Floats:
    """Randomised accept or reject by normalised uncertainty (M-RARU, arXiv 2511.11574).

    A text is accepted with a probability equal to its entropy over log C. The random number is a hash of
    seed and row, so that any number of machines decides alike without shared state. Ours: the paper draws
    until the batch is full; here the accepted come first and the rejected fill up, both by how far the
    entropy lies above or below the number.
    """
    uncertainty_N = np.nan_to_num(unread.uncertainty_N.astype(np.float64), nan=1.0)
    return uncertainty_N - hash_uniform(seed, unread.row_N)


def hash_uniform(seed: int, row_N: Ints) -> Floats:
    """float64[N] in [0, 1): a number of each row that looks random and depends on seed and row alone.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014), on the row's place in the seed's sequence.
    """
    with np.errstate(over="ignore"):
        x_N = (row_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x_N += np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_N ^= x_N >> np.uint64(31)
    return (x_N >> np.uint64(11)).astype(np.float64) / 2.0**53


def _known(signal_N: Floats, rng: np.random.Generator) -> Floats:
    """The student's signal, and for what it never scored a random number above all of them."""
    return np.where(np.isnan(signal_N), 1.0 + rng.random(signal_N.size), signal_N)
