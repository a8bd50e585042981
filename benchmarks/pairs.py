"""Ours against theirs on a machine that does other work, too: in turns, compared pair by pair.

What disturbs one of a pair mostly disturbs the other; so the ratio is the median of the pairs' own.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

HEADER = "| | theirs | ours | ratio, median of pairs |\n|---|---|---|---|"


def in_turns(ours: Callable[[], T], theirs: Callable[[], T], pairs: int) -> list[tuple[T, T]]:
    """(ours, theirs) of each pair; who goes first changes from pair to pair.

    A first call that is slower than the rest (caches, compilation) is the caller's to make before.
    """
    found = []
    for number in range(pairs):
        if number % 2:
            their = theirs()
            our = ours()
        else:
            our = ours()
            their = theirs()
        found.append((our, their))
        print(f"pair {number}: ours {said(our)}, theirs {said(their)}", file=sys.stderr, flush=True)
    return found


def ratios(pairs: Sequence[tuple[float, float]], unit: str) -> list[float]:
    """How many times as good as theirs ours is, in order; of a rate ("…/s") more is better, else less."""
    is_rate = unit.endswith("/s")
    return sorted(ours / theirs if is_rate else theirs / ours for ours, theirs in pairs)


def ratio_line(name: str, pairs: Sequence[tuple[float, float]], unit: str) -> str:
    """A line below HEADER: medians of both, and the median and the extremes of the pairs' ratios."""
    ours, theirs = (statistics.median(one) for one in zip(*pairs, strict=True))
    found = ratios(pairs, unit)
    ratio = f"{statistics.median(found):.2f} ({found[0]:.2f}–{found[-1]:.2f})"
    return f"| {name}, {unit} | {said(theirs)} | {said(ours)} | {ratio} |"


def said(value: object) -> str:
    """Four digits of a number, or of each of several."""
    if isinstance(value, tuple):
        return " / ".join(said(one) for one in value)
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
