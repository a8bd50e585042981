"""Every text by itself, every request under the cap, every outcome noted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.teacher.base import (
    UNASKED,
    Answers,
    AskOne,
    Meter,
    TeacherDown,
    TextFailed,
    Unlimited,
    Usage,
    label_batch,
)

C = 3
SURE = np.array([0.7, 0.2, 0.05])


class Purse:
    """An allowance that ends, and what was taken out of it."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.taken: list[tuple[int, int, int]] = []

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        await asyncio.sleep(0)
        if prompt_tokens + answer_tokens > self.tokens:
            return False
        self.tokens -= prompt_tokens + answer_tokens
        self.taken.append((texts, prompt_tokens, answer_tokens))
        return True


def ask(n_texts: int, ask_one: AskOne, allowance: Any = None, cut: int = 0) -> Answers:
    return asyncio.run(label_batch(n_texts, C, ask_one, allowance or Unlimited(), cut))


def test_each_text_has_its_own_outcome():
    answered: list[int] = []

    async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
        await meter.request(10 + i, 1)
        while len(answered) < 3 - i:  # the last one is answered first
            await asyncio.sleep(0)
        answered.append(i)
        if i == 1:
            raise TextFailed("too_odd", "at great length")
        return SURE + i / 100, i / 10

    answers = ask(4, one, cut=2)
    assert answered == [3, 2, 1, 0]
    assert list(answers.outcome_N) == ["", "too_odd", "", ""]
    assert answers.answered_N.tolist() == [True, False, True, True]
    for i in (0, 2, 3):
        assert answers.probs_NC[i] == pytest.approx(SURE + i / 100)
        assert answers.off_label_N[i] == pytest.approx(i / 10)
    assert answers.usage == Usage(texts=4, requests=4, prompt_tokens=46, answer_tokens=4, cut_texts=2)


def test_no_texts():
    answers = ask(0, None)
    assert answers.probs_NC.shape == (0, C)
    assert (answers.answered_N.shape, answers.answered_N.dtype) == ((0,), bool)
    assert answers.usage == Usage()


@settings(deadline=None)
@given(
    plan_NK=st.lists(st.lists(st.integers(1, 30), max_size=4), max_size=8),
    failing=st.sets(st.integers(0, 7)),
    tokens=st.integers(0, 300),
)
def test_usage_is_what_was_granted_and_sent_and_never_above_the_cap(
    plan_NK: Sequence[Sequence[int]], failing: set[int], tokens: int
):
    """Each request claims first, and its reply corrects what it has claimed."""
    sent_N: list[list[int]] = [[] for _ in plan_NK]

    async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
        for prompt in plan_NK[i]:
            await meter.request(prompt, 2)
            sent_N[i].append(prompt)
            await asyncio.sleep(0)
            meter.correct(cached_tokens=prompt // 2, answer_tokens=-1)
        if i in failing:
            raise TextFailed("too_odd")
        return SURE, 0.05

    purse = Purse(tokens)
    answers = ask(len(plan_NK), one, purse)
    sent = [prompt for own in sent_N for prompt in own]
    assert answers.prompt_tokens_N.tolist() == [sum(own) for own in sent_N]
    assert answers.usage == Usage(
        texts=sum(map(bool, sent_N)),
        requests=len(sent),
        prompt_tokens=sum(sent),
        cached_tokens=answers.cached_tokens_N.sum(),
        answer_tokens=answers.answer_tokens_N.sum(),
    )
    assert answers.usage.cached_tokens == sum(prompt // 2 for prompt in sent)
    assert answers.usage.answer_tokens == len(sent)
    claims = [(int(k == 0), prompt, 2) for own in sent_N for k, prompt in enumerate(own)]
    assert sorted(purse.taken) == sorted(claims), "a text is claimed once"
    for i, outcome in enumerate(answers.outcome_N):
        if outcome == UNASKED:
            assert len(sent_N[i]) < len(plan_NK[i])
        else:
            assert outcome == ("too_odd" if i in failing else "")
            assert sent_N[i] == list(plan_NK[i])


@pytest.mark.parametrize("error", [TeacherDown("gone"), RuntimeError("a mistake of ours"), None])
def test_an_error_of_the_teacher_ends_the_call_and_comes_out_bare(error):
    """All texts are under way together; a call that is cancelled (None) cancels its texts."""
    ended: list[int] = []

    async def script():
        everybody = asyncio.Barrier(5)

        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            await everybody.wait()
            if error and i == 2:
                raise error
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(i)
            raise AssertionError("nobody sets the event")

        call = asyncio.create_task(label_batch(4, C, one, Unlimited(), 0))
        await everybody.wait()
        if error is None:
            call.cancel()
        await call

    with pytest.raises(type(error) if error else asyncio.CancelledError) as caught:
        asyncio.run(script())
    assert error in (caught.value, None)
    assert sorted(ended) == ([0, 1, 3] if error else [0, 1, 2, 3])
