"""How any teacher is asked: every text by itself, each request under the cap, each outcome noted.

Shapes in names: N texts of one call, C labels.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from llkd_ray.answers import UNASKED, Allowance, Answers, TextFailed, Usage
from llkd_ray.together import together


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


async def ask_each(n_texts: int, n_classes: int, ask_one: AskOne, allowance: Allowance, cut: int) -> Answers:
    """Ask for every text at once and gather what comes; ``cut`` texts are cut.

    A :class:`~llkd_ray.answers.TeacherDown` of one text ends the call: the others are cancelled.
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

    await together(one(i) for i in range(n_texts))
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
