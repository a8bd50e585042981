"""What a teacher gives: answers to texts, and what they have used; and what can go wrong with it.

Shapes in names: N texts of one call, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any, Protocol

import numpy as np

from llkd_ray.teacher_config import PriceConfig

UNASKED = "unasked"
"""Outcome of a text that was not asked for, because the budget's cap was reached."""


@dataclass(frozen=True)
class Usage:
    """What texts have used of one teacher; adds up."""

    texts: int = 0
    """Texts sent, each counted once however often it was tried."""
    requests: int = 0
    prompt_tokens: int = 0
    """Of all requests, in a prefix cache or not."""
    cached_tokens: int = 0
    """Those of ``prompt_tokens`` that a prefix cache knew, where the source tells."""
    answer_tokens: int = 0
    reused_texts: int = 0
    """Texts whose answer was there from an earlier run."""
    reused_tokens: int = 0
    """Prompt and answer tokens that those answers had cost."""
    cut_texts: int = 0
    """Texts of which a part was left out, because they were too long."""
    seconds: float = 0.0
    """Wall-clock time of tickets in which something was asked; those in flight together count each."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens: what a cap counts."""
        return self.prompt_tokens + self.answer_tokens

    def cost(self, price: PriceConfig) -> Decimal:
        """In the price's currency, exactly."""
        return price.cost(self.prompt_tokens, self.cached_tokens, self.answer_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_usages(one: Mapping[str, Usage], other: Mapping[str, Usage]) -> dict[str, Usage]:
    """Usage by teacher, added up."""
    names = dict.fromkeys([*one, *other])
    return {name: one.get(name, Usage()) + other.get(name, Usage()) for name in names}


@dataclass(frozen=True)
class Answers:
    """What a teacher says to N texts, in their order."""

    probs_NC: np.ndarray
    """Probability mass on each label, not normalised; anything where there is no answer."""
    off_label_N: np.ndarray
    prompt_tokens_N: np.ndarray
    cached_tokens_N: np.ndarray
    answer_tokens_N: np.ndarray
    outcome_N: Sequence[str]
    """Empty where there is an answer; ``UNASKED``; or one word on why there is none, for the quarantine."""
    usage: Usage
    """What the call has used, texts without an answer included."""

    @property
    def answered_N(self) -> np.ndarray:
        """bool[N]"""
        return np.array([outcome == "" for outcome in self.outcome_N], dtype=bool)


class Allowance(Protocol):
    """The right to use texts and tokens, under the budget's cap."""

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        """Whether so many more may be used: asked before they are. False means that the cap is reached."""


class Unlimited:
    """An allowance without an end, where there is no cap."""

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        return True


class Labeller(Protocol):
    """One teacher, as a stage of the stream holds it: an engine, a client of a server, a file of answers."""

    async def label(self, ids: Sequence[str], texts: Sequence[str], allowance: Allowance) -> Answers:
        """Label distributions of some texts; several calls may be under way at a time.

        Raises :class:`TeacherDown` where none of them can be answered now, whatever they say.
        """

    def close(self) -> None:
        """Give back what it holds; it is not asked again."""


class TextFailed(Exception):
    """This text has no answer; another text may have one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class TeacherDown(Exception):
    """A teacher that cannot answer anything and has given up trying; says why, and what may help."""
