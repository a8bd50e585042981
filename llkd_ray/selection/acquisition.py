"""Acquisition: which unread texts the teacher reads next, based on the student's scores.

A policy gives every unread text a value, from its columns, the run's seed and a random number of the text.
The texts with the largest values are read, plus a randomly drawn share for exploration. Texts come in chunks,
and the choice does not depend on how they are divided (``search.py``).

Shapes in names: N unread texts of a chunk, M chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import AcquisitionConfig
from llkd_ray.metrics.uncertainty import Floats, Ints, RowRandom, hash_uniform
from llkd_ray.selection.search import TopK
from llkd_ray.selection.table import Chunked, Unread, slices

AcquisitionRule = Callable[[Unread, int, RowRandom], Floats]


@dataclass(frozen=True)
class AcquisitionPolicy:
    """An acquisition rule and its requirements."""

    rule: AcquisitionRule
    uses_student: bool
    """Whether the student must score the unread texts first."""
    explores: bool = True
    """Whether a share of the texts is drawn at random."""

    def choose(
        self,
        unread: Unread | Chunked[Unread],
        n: int,
        rng: np.random.Generator,
        *,
        seed: int = 0,
        explore: float = 0.0,
    ) -> Ints:
        """int64[M]: at most ``n`` rows, ascending, because neighbouring rows are cheap to read together.

        A share ``explore`` of them is drawn at random from all unread texts, so that the teacher also reads
        texts on which the student is confident but wrong; the rest are those with the largest values.
        """
        draw, explorer = RowRandom.from_rng(rng), RowRandom.from_rng(rng)
        explore = explore if self.explores else 0.0
        chunks = [unread.take(part) for part in slices(len(unread))] if isinstance(unread, Unread) else unread
        by_value, at_random, count = TopK(n), TopK(n), 0
        for chunk in chunks:
            count += len(chunk)
            by_value.add(chunk.row_N, self.rule(chunk, seed, draw))
            if explore:
                at_random.add(chunk.row_N, explorer(chunk.row_N))
        n = min(n, count)
        explored_M, best_M = at_random.best().row_M[: round(explore * n)], by_value.best().row_M[:n]
        others_M = best_M[~np.isin(best_M, explored_M)]
        return np.sort(np.concatenate([explored_M, others_M[: n - explored_M.size]]))


ACQUISITION: dict[str, AcquisitionPolicy] = {}


def find_acquisition(settings: AcquisitionConfig) -> AcquisitionPolicy:
    """The registered policy; raises ConfigError where its name is unknown."""
    if settings.policy not in ACQUISITION:
        known = ", ".join(sorted(ACQUISITION))
        raise ConfigError(f"acquisition.policy: {settings.policy!r} is unknown; there are {known}")
    return ACQUISITION[settings.policy]


def acquisition_policy(
    name: str, *, uses_student: bool, explores: bool = True
) -> Callable[[AcquisitionRule], AcquisitionRule]:
    """Register a rule ``(unread, seed, draw) -> value_N``.

    No value may be ``-inf``, or depend on the other texts.
    """

    def register(rule: AcquisitionRule) -> AcquisitionRule:
        ACQUISITION[name] = AcquisitionPolicy(rule, uses_student, explores)
        return rule

    return register


@acquisition_policy("sequential", uses_student=False, explores=False)
def value_sequential(unread: Unread, seed: int, draw: RowRandom) -> Floats:
    """In corpus order; ``acquisition.explore`` does not apply."""
    return -unread.row_N.astype(np.float64)


@acquisition_policy("random", uses_student=False)
def value_random(unread: Unread, seed: int, draw: RowRandom) -> Floats:
    """Uniformly at random."""
    return draw(unread.row_N)


@acquisition_policy("entropy", uses_student=True)
def value_entropy(unread: Unread, seed: int, draw: RowRandom) -> Floats:
    """By the student's entropy, largest first; texts without a score come first, at random."""
    return _known(unread.uncertainty_N, unread, draw)


@acquisition_policy("margin", uses_student=True)
def value_margin(unread: Unread, seed: int, draw: RowRandom) -> Floats:
    """By the student's margin between its two best labels, smallest first; texts without a score come first,
    at random.
    """
    return _known(1.0 - unread.margin_N.astype(np.float64), unread, draw)


@acquisition_policy("m_raru", uses_student=True)
def value_m_raru(unread: Unread, seed: int, draw: RowRandom) -> Floats:
    """Randomised accept or reject by normalised uncertainty (M-RARU, arXiv 2511.11574).

    A text is accepted with a probability equal to its entropy over log C. The random number is a hash of seed
    and row, so that no state is shared. Deviation: the paper draws until the batch is full; here the accepted
    texts come first and the rejected ones fill up the batch, both ordered by entropy minus the random number.
    """
    uncertainty_N = np.nan_to_num(unread.uncertainty_N.astype(np.float64), nan=1.0)
    return uncertainty_N - hash_uniform(seed, unread.row_N)


def _known(signal_N: Floats, unread: Unread, draw: RowRandom) -> Floats:
    """The student's signal; for a text without a score, a random number above all signals."""
    return np.where(np.isnan(signal_N), 1.0 + draw(unread.row_N), signal_N)
