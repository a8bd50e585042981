"""Numbers and texts as people read them, on pages, in figures and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

MISSING = "–"
SAMPLE_CHARS = 400
"""Of a sample text; the rest is cut off."""
NARROW = "\u202f"
"""A narrow space that does not break."""


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}{NARROW}%"


def percent_range(interval: Sequence[float] | None) -> str:
    return MISSING if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}{NARROW}%"


def count(number: float | None) -> str:
    return MISSING if number is None else f"{number:,.0f}"


def decimals(number: float | None, places: int = 3) -> str:
    return MISSING if number is None else f"{number:.{places}f}"


def money(amount: float | None, currency: str) -> str:
    """Small sums with as many digits as it takes to tell them from nothing."""
    if amount is None:
        return MISSING
    return f"{amount:,.2f}{NARROW}{currency}" if not 0 < amount < 0.1 else f"{amount:.2g}{NARROW}{currency}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.3g}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NARROW}h {minutes}{NARROW}min" if hours else f"{minutes}{NARROW}min {rest}{NARROW}s"


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS].rstrip() + "…"


def markdown(text: str) -> str:
    """A name as plain text in Markdown, in tables too."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.split()))
