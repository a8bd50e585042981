"""Long columns in pieces that fit a processor's cache, so that no step needs memory for all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

CHUNK = 1 << 16
"""Rows looked at together. Results do not depend on it; sums by class need 2**20 at most.

With four times as many, counting grades took three times as long a row."""


def slices(n: int) -> Iterator[slice]:
    """``range(n)`` in chunks; one that is empty where there is nothing."""
    for start in range(0, max(n, 1), CHUNK):
        yield slice(start, min(start + CHUNK, n))


class Texts(Protocol):
    """Columns over some texts."""

    def __len__(self) -> int: ...


T = TypeVar("T", bound=Texts)


class Chunked(Generic[T]):
    """Texts in ascending row order, read anew each time they are gone through and never there all at once."""

    def __init__(self, read: Callable[[], Iterable[T]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[T]:
        return iter(self._read())

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self)
