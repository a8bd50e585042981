"""What a teacher gives: answers to texts, and what they have used; and what can go wrong with it.

Shapes in names: N texts of one call, C labels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any, Protocol, TypeVar

import numpy as np

from llkd_ray.config.teacher import PriceConfig

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


class Teacher(Protocol):
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


T = TypeVar("T")


async def gather_or_cancel(tasks: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like asyncio.gather, but what fails ends the others, and its exception comes alone."""
    try:
        async with asyncio.TaskGroup() as group:
            started = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in started]


class CapReached(Exception):
    """A request was not made, because the budget's cap leaves no room for it."""


class Meter:
    """What one text uses; asks the allowance before every request."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.requests = self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0

    async def request(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Claim what a request uses at most; a failed one has used it. Raises :class:`CapReached`."""
        first = not self.requests
        if not await self.allowance.take(
            texts=int(first), prompt_tokens=prompt_tokens, answer_tokens=answer_tokens
        ):
            raise CapReached
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.answer_tokens += answer_tokens

    def correct(self, *, prompt_tokens: int = 0, cached_tokens: int = 0, answer_tokens: int = 0) -> None:
        """Once a request is answered: what it used more (or, negative, less) than was claimed for it."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.answer_tokens += answer_tokens


AskOne = Callable[[int, Meter], Awaitable[tuple[Any, float]]]
"""``ask_one(i, meter)`` gives float[C] and the off-label mass of text ``i``, or raises TextFailed."""


async def label_batch(
    n_texts: int, n_classes: int, ask_one: AskOne, allowance: Allowance, cut: int
) -> Answers:
    """Ask for every text at once and gather what comes; ``cut`` texts are cut.

    A :class:`~llkd_ray.teacher.base.TeacherDown` of one text ends the call: the others are cancelled.
    """
    probs_NC = np.zeros((n_texts, n_classes))
    off_label_N = np.zeros(n_texts)
    outcome_N = [""] * n_texts
    meters = [Meter(allowance) for _ in range(n_texts)]

    async def one(i: int) -> None:
        try:
            probs_NC[i], off_label_N[i] = await ask_one(i, meters[i])
        except TextFailed as failure:
            outcome_N[i] = failure.reason
        except CapReached:
            outcome_N[i] = UNASKED

    await gather_or_cancel(one(i) for i in range(n_texts))
    names = ("requests", "prompt_tokens", "cached_tokens", "answer_tokens")
    used = {name: np.array([getattr(meter, name) for meter in meters], dtype=np.int64) for name in names}
    return Answers(
        probs_NC=probs_NC,
        off_label_N=off_label_N,
        prompt_tokens_N=used["prompt_tokens"],
        cached_tokens_N=used["cached_tokens"],
        answer_tokens_N=used["answer_tokens"],
        outcome_N=outcome_N,
        usage=Usage(
            texts=int(np.count_nonzero(used["requests"])),
            cut_texts=cut,
            **{name: int(used_N.sum()) for name, used_N in used.items()},
        ),
    )
