"""The interface of a teacher: answers to texts, their usage, and the errors a teacher raises.

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
"""Outcome of a text that was not sent, because the budget's cap was reached."""


@dataclass(frozen=True)
class Usage:
    """What texts have used of one teacher; values can be added."""

    texts: int = 0
    """Texts sent, each counted once regardless of retries."""
    requests: int = 0
    prompt_tokens: int = 0
    """Of all requests, whether or not they were in a prefix cache."""
    cached_tokens: int = 0
    """Those of ``prompt_tokens`` that were in a prefix cache, where the source reports it."""
    answer_tokens: int = 0
    reused_texts: int = 0
    """Texts whose answer was reused from an earlier run."""
    reused_tokens: int = 0
    """Prompt and answer tokens that the reused answers had cost."""
    cut_texts: int = 0
    """Texts that were truncated because they were too long."""
    seconds: float = 0.0
    """Wall-clock time of tickets with at least one request; tickets in flight together count each."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens: what a cap counts."""
        return self.prompt_tokens + self.answer_tokens

    def cost(self, price: PriceConfig) -> Decimal:
        """The exact cost, in the price's currency."""
        return price.cost(self.prompt_tokens, self.cached_tokens, self.answer_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_usages(one: Mapping[str, Usage], other: Mapping[str, Usage]) -> dict[str, Usage]:
    """Sum of two usages, by teacher."""
    names = dict.fromkeys([*one, *other])
    return {name: one.get(name, Usage()) + other.get(name, Usage()) for name in names}


@dataclass(frozen=True)
class Answers:
    """A teacher's answers to N texts, in the order of the texts."""

    probs_NC: np.ndarray
    """Probability mass on each label, not normalised; undefined where there is no answer."""
    off_label_N: np.ndarray
    prompt_tokens_N: np.ndarray
    cached_tokens_N: np.ndarray
    answer_tokens_N: np.ndarray
    outcome_N: Sequence[str]
    """Empty where there is an answer; ``UNASKED``; or a one-word reason for the quarantine."""
    usage: Usage
    """Usage of the call, including texts without an answer."""

    @property
    def answered_N(self) -> np.ndarray:
        """bool[N]"""
        return np.array([outcome == "" for outcome in self.outcome_N], dtype=bool)


class Allowance(Protocol):
    """The right to use texts and tokens, within the budget's cap."""

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        """Whether this much more may be used; call it before any use. False means that the cap is reached."""


class Unlimited:
    """An unlimited allowance, where there is no cap."""

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        return True


class Teacher(Protocol):
    """One teacher in a stage of the stream: an engine, a client of a server, or a file of answers."""

    async def label(self, ids: Sequence[str], texts: Sequence[str], allowance: Allowance) -> Answers:
        """Label distributions of some texts; several calls may run concurrently.

        Raises :class:`TeacherDown` where the teacher currently cannot answer any text.
        """

    def close(self) -> None:
        """Release its resources; it must not be called again."""


class TextFailed(Exception):
    """This text has no answer; other texts may still get one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class TeacherDown(Exception):
    """The teacher cannot answer anything and has stopped retrying; states the reason and possible fixes."""


T = TypeVar("T")


async def gather_or_cancel(tasks: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like asyncio.gather, but a failure cancels the other tasks, and only its exception is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            started = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in started]


class CapReached(Exception):
    """A request was not sent, because the budget's cap leaves no room for it."""


class Meter:
    """Measures the usage of one text; requests an allowance before every request."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.requests = self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0

    async def request(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Claim a request's maximum usage; a failed request keeps its claim. Raises :class:`CapReached`."""
        first = not self.requests
        if not await self.allowance.take(
            texts=int(first), prompt_tokens=prompt_tokens, answer_tokens=answer_tokens
        ):
            raise CapReached
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.answer_tokens += answer_tokens

    def correct(self, *, prompt_tokens: int = 0, cached_tokens: int = 0, answer_tokens: int = 0) -> None:
        """After a reply: add the actual usage minus what was claimed (negative if less was used)."""
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.answer_tokens += answer_tokens


AskOne = Callable[[int, Meter], Awaitable[tuple[Any, float]]]
"""``ask_one(i, meter)`` returns float[C] and the off-label mass of text ``i``, or raises TextFailed."""


async def label_batch(
    n_texts: int, n_classes: int, ask_one: AskOne, allowance: Allowance, cut: int
) -> Answers:
    """Request answers for all texts concurrently and collect the results; ``cut`` texts are truncated.

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
