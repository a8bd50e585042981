"""What an engine is asked and what it replies, in our own words.

vLLM's own take seconds to import and long to send; whoever asks an engine in another process needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class NextToken:
    """How probable is each of these tokens as the next one, among all of the vocabulary?"""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """Some answers, drawn at random."""

    number: int
    longest: int
    """Tokens of an answer, at most."""
    temperature: float


Wish = NextToken | Samples


@dataclass(frozen=True)
class Reply:
    """What came of one request."""

    cached_tokens: int
    """Tokens of the prompt that the prefix cache knew."""
    probs: tuple[float, ...] = ()
    """Of a :class:`NextToken`'s tokens."""
    answers: tuple[str, ...] = ()
    """Of :class:`Samples`."""
    answer_tokens: int = 0
    """Of all answers together."""


class EngineLost(Exception):
    """The engine died, hung or failed with the request; it may be the text's doing, or not."""


class EngineDied(EngineLost):
    """It has not only lost the request, it is no more."""

    def __init__(self) -> None:
        super().__init__("engine_died")


class RunningEngine(Protocol):
    """An engine that has started. Belongs to the event loop that first asks it."""

    async def reply(self, token_ids: Sequence[int], wish: Wish) -> Reply:
        """Raises :class:`EngineLost`, and ``TextFailed`` where it refuses the request.

        Whoever stops waiting takes the request out of the engine.
        """

    def shutdown(self) -> None:
        """Put it away, whatever it does; requests under way are lost."""
