"""Numbers in [0, 1] as whole numbers: to hold them in 16 bits, and to add them up in any order.

The sum of floats depends on their order in the last bits, and so on chunks and shards; that of whole numbers
does not. Shapes in names: N texts, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llkd_ray.chunks import slices
from llkd_ray.signals import Floats, Ints

UNIT = 2.0**-32
"""What sums count in. Any float32 from 2**-9 on is a whole number of it; int64 holds two billion ones."""

UNKNOWN = np.uint16(65535)
"""Stands for nan in 16 bits."""
_STEPS = 65534
# A look-up, because that is as fast as the division and needs no second pass for what is unknown.
_SHARE_OF_CODE = np.append(np.arange(65535) / _STEPS, np.nan).astype(np.float32)


def to_16_bits(share_N: Floats) -> NDArray[np.uint16]:
    """uint16[N]: the nearest of 65,535 values in [0, 1], off by 1/131,068 at most; nan stays nan."""
    code_N = np.rint(np.asarray(share_N, dtype=np.float64) * _STEPS)
    return np.where(np.isnan(code_N), UNKNOWN, np.nan_to_num(code_N)).astype(np.uint16)


def from_16_bits(code_N: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32[N]: what :func:`to_16_bits` was given, to half a step; it gives the same code again."""
    return _SHARE_OF_CODE.take(code_N)


def class_sums(signal_N: Floats, label_N: Ints, n_classes: int) -> NDArray[np.int64]:
    """int64[C]: the sum of a signal in [0, 1] over each label's texts, in :data:`UNIT`."""
    sum_C = np.zeros(n_classes, dtype=np.int64)
    for part in slices(label_N.size):
        # bincount adds up in float64, which is exact up to 2**53: a chunk comes to 2**48.
        units_N = np.rint(signal_N[part] * np.float64(1 / UNIT))
        sum_C += np.bincount(label_N[part], weights=units_N, minlength=n_classes).astype(np.int64)
    return sum_C
