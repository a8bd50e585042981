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
    CapReached,
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

    def __init__(self, tokens: int = 10**9, texts: int = 10**9) -> None:
        self.tokens, self.texts = tokens, texts
        self.taken: list[tuple[int, int, int]] = []

    async def take(self, *, texts: int = 0, prompt_tokens: int = 0, answer_tokens: int = 0) -> bool:
        await asyncio.sleep(0)
        if texts > self.texts or prompt_tokens + answer_tokens > self.tokens:
            return False
        self.texts -= texts
        self.tokens -= prompt_tokens + answer_tokens
        self.taken.append((texts, prompt_tokens, answer_tokens))
        return True


def ask(n_texts: int, ask_one: AskOne, allowance: Any = None, cut: int = 0) -> Answers:
    return asyncio.run(label_batch(n_texts, C, ask_one, allowance or Unlimited(), cut))


class TestMeter:
    def test_claims_come_first_and_count_a_text_once(self):
        purse = Purse()
        meter = Meter(purse)

        async def script():
            for tokens in (10, 12, 11):
                await meter.request(tokens, 1)

        asyncio.run(script())
        assert purse.taken == [(1, 10, 1), (0, 12, 1), (0, 11, 1)]
        assert (meter.requests, meter.prompt_tokens, meter.answer_tokens) == (3, 33, 3)

    def test_what_is_refused_is_not_used(self):
        meter = Meter(Purse(tokens=25))

        async def script():
            await meter.request(20, 1)
            with pytest.raises(CapReached):
                await meter.request(20, 1)

        asyncio.run(script())
        assert (meter.requests, meter.prompt_tokens, meter.answer_tokens) == (1, 20, 1)

    def test_a_reply_corrects_what_was_claimed_for_it(self):
        meter = Meter(Purse())

        async def script():
            await meter.request(20, 50)
            meter.correct(prompt_tokens=2, cached_tokens=16, answer_tokens=-43)

        asyncio.run(script())
        assert (meter.prompt_tokens, meter.cached_tokens, meter.answer_tokens) == (22, 16, 7)


class TestOutcomes:
    def test_each_text_has_its_own(self):
        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            await meter.request(10 + i, 1)
            await asyncio.sleep(0.001 * (4 - i))  # the last one is answered first
            if i == 1:
                raise TextFailed("too_odd", "at great length")
            return SURE + i / 100, i / 10

        answers = ask(4, one, cut=2)
        assert list(answers.outcome_N) == ["", "too_odd", "", ""]
        assert answers.answered_N.tolist() == [True, False, True, True]
        for i in (0, 2, 3):
            assert answers.probs_NC[i] == pytest.approx(SURE + i / 100)
            assert answers.off_label_N[i] == pytest.approx(i / 10)
        assert answers.prompt_tokens_N.tolist() == [10, 11, 12, 13]
        assert answers.usage == Usage(texts=4, requests=4, prompt_tokens=46, answer_tokens=4, cut_texts=2)

    def test_all_texts_are_under_way_together(self):
        async def script():
            everybody = asyncio.Barrier(5)

            async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
                await everybody.wait()
                return SURE, 0.0

            return await asyncio.wait_for(label_batch(5, C, one, Unlimited(), 0), 5)

        assert asyncio.run(script()).answered_N.all()

    def test_no_texts(self):
        answers = ask(0, None)
        assert answers.probs_NC.shape == (0, C)
        assert answers.answered_N.shape == (0,)
        assert answers.answered_N.dtype == bool
        assert answers.usage == Usage()

    def test_a_text_that_fails_before_any_request_has_used_nothing(self):
        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            raise TextFailed("not_mine")

        assert ask(3, one).usage == Usage()


class TestCap:
    def test_what_the_cap_has_no_room_for_is_not_asked(self):
        sent = []

        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            await meter.request(10, 1)
            sent.append(i)
            return SURE, 0.05

        answers = ask(5, one, Purse(tokens=35))
        assert sorted(answers.outcome_N) == ["", "", "", UNASKED, UNASKED]
        assert [answers.outcome_N[i] for i in sent] == ["", "", ""]
        assert answers.usage == Usage(texts=3, requests=3, prompt_tokens=30, answer_tokens=3)

    def test_what_a_text_used_before_the_cap_came_is_counted(self):
        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            await meter.request(10, 1)
            meter.correct(cached_tokens=8)
            await meter.request(15, 1)
            return SURE, 0.05

        purse = Purse(tokens=20)
        answers = ask(1, one, purse)
        assert list(answers.outcome_N) == [UNASKED]
        assert answers.usage == Usage(texts=1, requests=1, prompt_tokens=10, cached_tokens=8, answer_tokens=1)
        assert purse.taken == [(1, 10, 1)]

    @settings(deadline=None)
    @given(
        plan_NK=st.lists(st.lists(st.integers(1, 30), max_size=4), max_size=8),
        failing=st.sets(st.integers(0, 7)),
        tokens=st.integers(0, 300),
    )
    def test_usage_is_the_sum_of_the_columns_and_never_above_the_cap(
        self, plan_NK: Sequence[Sequence[int]], failing: set[int], tokens: int
    ):
        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            for prompt in plan_NK[i]:
                await meter.request(prompt, 2)
                await asyncio.sleep(0)
                meter.correct(cached_tokens=prompt // 2, answer_tokens=-1)
            if i in failing:
                raise TextFailed("too_odd")
            return SURE, 0.05

        purse = Purse(tokens)
        answers = ask(len(plan_NK), one, purse)
        usage = answers.usage
        assert usage.prompt_tokens == answers.prompt_tokens_N.sum()
        assert usage.cached_tokens == answers.cached_tokens_N.sum()
        assert usage.answer_tokens == answers.answer_tokens_N.sum()
        assert usage.tokens <= tokens
        assert usage.texts == sum(texts for texts, _, _ in purse.taken)
        assert usage.requests == len(purse.taken)
        for i, outcome in enumerate(answers.outcome_N):
            if outcome != UNASKED:
                assert answers.prompt_tokens_N[i] == sum(plan_NK[i])
                assert outcome == ("too_odd" if i in failing else "")


class TestErrors:
    @pytest.mark.parametrize("error", [TeacherDown("the server is gone"), RuntimeError("a mistake of ours")])
    def test_an_error_of_the_teacher_ends_the_call_and_comes_out_bare(self, error):
        ended = []

        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            if i == 2:
                await asyncio.sleep(0.001)
                raise error
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(i)
            raise AssertionError("nobody sets the event")

        with pytest.raises(type(error)) as caught:
            ask(4, one)
        assert caught.value is error
        assert sorted(ended) == [0, 1, 3]

    def test_a_call_that_is_cancelled_cancels_its_texts(self):
        ended = []

        async def one(i: int, meter: Meter) -> tuple[np.ndarray, float]:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(i)
            raise AssertionError("nobody sets the event")

        async def script():
            await asyncio.wait_for(label_batch(3, C, one, Unlimited(), 0), 0.01)

        with pytest.raises(TimeoutError):
            asyncio.run(script())
        assert sorted(ended) == [0, 1, 2]
