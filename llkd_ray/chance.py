"""Chance that does not depend on who asks, or in which order: a number of each row and a key.

Numbers from a stream depend on how many were drawn before; these do not, so that any division of the rows
into chunks, shards and machines decides alike. Shapes in names: N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llkd_ray.signals import Floats, Ints


@dataclass(frozen=True)
class Draw:
    """Uniform random numbers, one for each row."""

    key: int
    """In [0, 2**64)."""

    @classmethod
    def from_rng(cls, rng: np.random.Generator) -> Draw:
        """Another one at each call."""
        return cls(int(rng.integers(2**63)))

    def __call__(self, row_N: Ints) -> Floats:
        """float64[N] in [0, 1)."""
        return hash_uniform(self.key, row_N)


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
