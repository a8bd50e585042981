"""An engine that dies, hangs or does not start costs no answer, save that of the text that kills engines.

The engines are fakes with the interface of a running one; no process is started.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import TeacherDown, TextFailed
from llkd_ray.teacher.vllm import engine as engine_module
from llkd_ray.teacher.vllm.engine import Engine, Gate
from llkd_ray.teacher.vllm.requests import EngineDied, EngineLost, EngineResponse, NextToken

REQUEST = NextToken((1, 2))
REPLY_S = 0.01
TIMEOUT_S = 0.2
"""Silence after which a test's engine is taken for hung."""
PATIENT_S = 2.0
"""The same where steady replies are to be in time, on a busy machine as well."""


class FakeEngine:
    """Replies to a text, a number that stands for its tokens, as ``behave`` lets it."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.is_dead = False
        self.closed_at: float | None = None
        self.under_way: list[int] = []

    async def generate(self, token_ids, request):
        assert request == REQUEST
        (text,) = token_ids
        self.maker.tries[text] += 1
        self.under_way.append(text)
        self.maker.seen_together.append(tuple(self.under_way))
        try:
            await self.maker.behave(self, text)
            if self.is_dead:
                raise EngineDied
            self.maker.replied_at = time.monotonic()
            return EngineResponse(text)
        finally:
            self.under_way.remove(text)

    def shutdown(self) -> None:
        assert self.closed_at is None, "an engine is shut down once"
        self.closed_at = time.monotonic()
        time.sleep(self.maker.closing_s)


Behave = Callable[[FakeEngine, int], Awaitable[None]]


async def reply(engine: FakeEngine, text: int) -> None:
    await asyncio.sleep(REPLY_S)


def killed_by(*poison: int) -> Behave:
    """Engines that die of some texts."""

    async def behave(engine: FakeEngine, text: int) -> None:
        await asyncio.sleep(REPLY_S / 2 if text in poison else REPLY_S)
        engine.is_dead |= text in poison

    return behave


class Maker:
    """Makes fake engines and sees what they are asked; the first ``failures`` starts raise."""

    def __init__(self, behave: Behave = reply, failures: Sequence[str] = ()) -> None:
        self.behave = behave
        self.failures = list(failures)
        self.starts = 0
        self.engines: list[FakeEngine] = []
        self.tries: Counter[int] = Counter()
        self.seen_together: list[tuple[int, ...]] = []
        """For each request, the texts in its engine when it came, itself the last."""
        self.replied_at = 0.0
        self.closing_s = 0.0
        """Seconds that it takes to shut an engine down."""

    def __call__(self) -> FakeEngine:
        self.starts += 1
        if self.failures:
            raise RuntimeError(self.failures.pop(0))
        self.engines.append(FakeEngine(self))
        return self.engines[-1]


def make_teacher(**settings: Any) -> TeacherConfig:
    return TeacherConfig(model="toy-model", **settings)


def make_engine(maker: Maker, **settings: Any) -> Engine:
    return Engine(make_teacher(**settings), lambda seconds: None, maker)


def ask(engine: Engine, text: int) -> Awaitable[Any]:
    return engine.with_retries(lambda: engine.generate([text], REQUEST))


async def ask_all(engine: Engine, texts: Sequence[int]) -> list[Any]:
    """Replies, or the exceptions in their place."""
    return await asyncio.gather(*(ask(engine, text) for text in texts), return_exceptions=True)


def replies(texts: Sequence[int]) -> list[EngineResponse]:
    return [EngineResponse(text) for text in texts]


@pytest.fixture(autouse=True)
def back_offs(monkeypatch):
    """The waits of a second and more, which take no time here."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def quick(seconds, *result):
        if seconds >= 1:
            waits.append(seconds)
        return await sleep(0 if seconds >= 1 else seconds, *result)

    monkeypatch.setattr(engine_module.asyncio, "sleep", quick)
    return waits


class TestStart:
    def test_once_for_all_and_only_when_it_is_needed(self):
        maker, took = Maker(), []
        engine = Engine(make_teacher(), took.append, maker)
        assert maker.starts == 0
        assert asyncio.run(ask_all(engine, range(20))) == replies(range(20))
        assert maker.starts == 1
        assert len(took) == 1
        assert took[0] >= 0
        assert max(map(len, maker.seen_together)) == 20, "one text need not wait for another"

    def test_memory_that_is_short_for_a_moment(self, back_offs):
        maker, took = Maker(failures=["out of memory"]), []
        engine = Engine(make_teacher(), took.append, maker)
        assert asyncio.run(ask_all(engine, range(5))) == replies(range(5))
        assert maker.starts == 2
        assert len(took) == 1, "only a start that came to something is reported"
        assert len(back_offs) == 1

    def test_one_that_never_starts_is_given_up_for_good(self, back_offs):
        maker = Maker(failures=["out of memory"] * 100)
        engine = make_engine(maker, attempts=3)

        async def script():
            return await ask_all(engine, range(6)), await ask_all(engine, [7])

        first, later = asyncio.run(script())
        assert maker.starts == 3
        assert back_offs == sorted(back_offs)
        assert len(back_offs) == 2
        for outcome in [*first, *later]:
            assert isinstance(outcome, TeacherDown)
            assert "'toy-model' did not start in 3 tries: out of memory" in str(outcome)

    def test_one_that_starts_too_slowly(self):
        maker = Maker()

        def start() -> FakeEngine:
            time.sleep(0.3)
            return maker()

        engine = Engine(make_teacher(start_timeout_s=0.05), lambda seconds: None, start)
        (outcome,) = asyncio.run(ask_all(engine, [1]))
        assert isinstance(outcome, TeacherDown)
        assert "has not started within 0.05 s; raise teacher.start_timeout_s" in str(outcome)
        assert maker.starts == 1
        assert maker.tries == {}
        assert maker.engines[0].closed_at is not None, "one that comes too late is put away"

    def test_one_that_starts_in_the_moment_in_which_patience_ends(self, monkeypatch):
        maker = Maker()

        async def late(start, timeout):
            await start
            raise TimeoutError

        monkeypatch.setattr(engine_module.asyncio, "wait_for", late)
        (outcome,) = asyncio.run(ask_all(make_engine(maker), [1]))
        assert isinstance(outcome, TeacherDown)
        assert maker.engines[0].closed_at is not None


class TestDeath:
    def test_everybody_gets_an_answer_when_an_engine_dies(self):
        async def first_dies(engine, text):
            await asyncio.sleep(REPLY_S)
            engine.is_dead |= engine is maker.engines[0] and text == 3

        maker = Maker(first_dies)
        assert asyncio.run(ask_all(make_engine(maker), range(8))) == replies(range(8))
        assert maker.starts == 2
        assert maker.engines[0].closed_at is not None
        assert maker.engines[1].closed_at is None

    def test_suspects_are_asked_alone(self):
        maker = Maker(killed_by(3))
        engine = make_engine(maker)

        async def script():
            suspects = asyncio.create_task(ask_all(engine, range(8)))
            await asyncio.sleep(1.2 * REPLY_S)  # the first engine is dead, and its texts wait
            return await suspects, await ask_all(engine, range(20, 28))

        outcomes, others = asyncio.run(script())
        assert others == replies(range(20, 28))
        assert isinstance(outcomes[3], TextFailed)
        seen: Counter[int] = Counter()
        for *beside, text in maker.seen_together:
            if seen[text]:
                assert beside == [], f"text {text} is asked again"
            for other in beside:
                assert seen[other] == 1, f"text {text} is asked beside {other}, which is asked again"
            seen[text] += 1
        assert max(seen.values()) > 1

    @pytest.mark.parametrize("attempts", [2, 3, 4])
    def test_one_text_that_kills_every_engine_fails_alone(self, attempts):
        maker = Maker(killed_by(5))
        outcomes = asyncio.run(ask_all(make_engine(maker, attempts=attempts), range(12)))
        (poison,) = [outcome for outcome in outcomes if not isinstance(outcome, EngineResponse)]
        assert isinstance(poison, TextFailed)
        assert poison.reason == "engine_died"
        assert outcomes[:5] + outcomes[6:] == replies([*range(5), *range(6, 12)])
        assert maker.tries[5] == attempts
        assert max(maker.tries[text] for text in range(12) if text != 5) == 2
        assert sum(one.closed_at is not None for one in maker.engines) == attempts

    @settings(deadline=None, max_examples=30)
    @given(
        poison=st.sets(st.integers(0, 11), max_size=2),
        arrival_N=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    )
    def test_whenever_texts_come_only_those_that_kill_fail(self, poison, arrival_N):
        maker = Maker(killed_by(*poison))
        engine = make_engine(maker, attempts=4)

        async def later(text: int) -> Any:
            await asyncio.sleep(arrival_N[text] * REPLY_S / 3)
            return await ask(engine, text)

        async def script():
            return await asyncio.gather(*map(later, range(12)), return_exceptions=True)

        for text, outcome in enumerate(asyncio.run(script())):
            if text in poison:
                assert isinstance(outcome, TextFailed)
                assert (outcome.reason, maker.tries[text]) == ("engine_died", 4)
            else:
                assert outcome == EngineResponse(text)
                assert maker.tries[text] <= 2
        assert maker.starts == len(maker.engines)
        assert sum(one.closed_at is None for one in maker.engines) <= 1, "only the last one is kept"

    def test_engines_that_are_lost_whatever_they_are_asked(self):
        maker = Maker(killed_by(*range(100)))
        engine = make_engine(maker, attempts=2)

        async def script():
            return await ask_all(engine, range(10)), await ask_all(engine, [50])

        first, later = asyncio.run(script())
        assert maker.starts == 5, "more than two texts can lose"
        assert {type(outcome) for outcome in first} == {TextFailed, TeacherDown}
        assert sum(isinstance(outcome, TeacherDown) for outcome in first) == 7
        assert isinstance(later[0], TeacherDown)
        assert "5 engines of 'toy-model' were lost one after the other" in str(later[0])
        assert maker.tries[50] == 0

    def test_two_texts_that_kill_one_after_the_other_are_no_reason_to_give_up(self):
        maker = Maker(killed_by(1, 2))
        engine = make_engine(maker, attempts=3)

        async def script():
            return [await ask_all(engine, [text]) for text in (1, 2, 3)]

        (first,), (second,), (third,) = asyncio.run(script())
        assert [type(first), type(second), third] == [TextFailed, TextFailed, EngineResponse(3)]
        assert maker.starts == 7

    def test_losses_with_replies_between_them_are_no_reason_to_give_up(self):
        maker = Maker(killed_by(1))
        engine = make_engine(maker, attempts=2)

        async def script():
            return [await ask_all(engine, [text]) for text in [1, 0] * 6]

        outcomes = [outcome for (outcome,) in asyncio.run(script())]
        assert outcomes[1::2] == replies([0] * 6)
        assert [type(outcome) for outcome in outcomes[::2]] == [TextFailed] * 6
        assert maker.starts == 13


class TestHang:
    def test_silence_is_found_out(self):
        async def first_hangs(engine, text):
            await (asyncio.Event().wait() if engine is maker.engines[0] else reply(engine, text))

        maker = Maker(first_hangs)
        engine = make_engine(maker, timeout_s=TIMEOUT_S)
        began = time.monotonic()
        assert asyncio.run(ask_all(engine, range(6))) == replies(range(6))
        assert maker.starts == 2
        assert maker.engines[0].closed_at - began >= TIMEOUT_S

    def test_not_before_the_others_have_their_replies(self):
        async def behave(engine, text):
            if text == 0:
                await asyncio.Event().wait()
            await asyncio.sleep(text * PATIENT_S / 20)  # one reply after the other, longer than the limit

        maker = Maker(behave)
        outcomes = asyncio.run(ask_all(make_engine(maker, timeout_s=PATIENT_S, attempts=2), range(26)))
        assert outcomes[1:] == replies(range(1, 26))
        assert all(maker.tries[text] == 1 for text in range(1, 26))
        assert isinstance(outcomes[0], TextFailed)
        assert outcomes[0].reason == "engine_hung"
        assert maker.tries[0] == 2
        assert maker.engines[0].closed_at - maker.replied_at >= 0.9 * PATIENT_S

    def test_a_long_queue_with_steady_replies_is_no_hang(self):
        turn = asyncio.Lock()

        async def one_at_a_time(engine, text):
            async with turn:
                await asyncio.sleep(PATIENT_S / 20)

        maker = Maker(one_at_a_time)
        began = time.monotonic()
        outcomes = asyncio.run(ask_all(make_engine(maker, timeout_s=PATIENT_S), range(25)))
        assert time.monotonic() - began > PATIENT_S, "the last one waits longer than the limit"
        assert outcomes == replies(range(25))
        assert maker.starts == 1

    def test_a_pause_between_two_tickets_is_no_hang(self):
        maker = Maker()
        engine = make_engine(maker, timeout_s=TIMEOUT_S)

        async def script():
            first = await ask_all(engine, [1])
            await asyncio.sleep(1.5 * TIMEOUT_S)
            return first + await ask_all(engine, [2])

        assert asyncio.run(script()) == replies([1, 2])
        assert maker.starts == 1

    def test_what_a_hung_engine_says_when_it_is_put_away_is_of_no_interest(self, caplog):
        async def until_closed(engine, text):
            while engine.closed_at is None:
                await asyncio.sleep(0.001)
            engine.is_dead = True

        maker = Maker(until_closed)
        maker.closing_s = 0.05
        engine = make_engine(maker, timeout_s=TIMEOUT_S, attempts=1)
        with caplog.at_level(logging.ERROR):
            outcomes = asyncio.run(ask_all(engine, range(3)))
            gc.collect()  # a task complains of an exception that nobody took when it is collected
        assert [outcome.reason for outcome in outcomes] == ["engine_hung"] * 3
        assert caplog.records == []


class TestOtherErrors:
    def test_a_refused_request_is_not_made_again(self):
        async def behave(engine, text):
            await asyncio.sleep(REPLY_S)
            if text == 2:
                raise TextFailed("refused_by_engine", "the prompt is too long")

        maker = Maker(behave)
        outcomes = asyncio.run(ask_all(make_engine(maker), range(5)))
        assert isinstance(outcomes[2], TextFailed)
        assert outcomes[2].reason == "refused_by_engine"
        assert "too long" in str(outcomes[2])
        assert outcomes[:2] + outcomes[3:] == replies([0, 1, 3, 4])
        assert (maker.starts, maker.tries[2]) == (1, 1)

    def test_an_error_that_the_engine_lives_through(self):
        async def behave(engine, text):
            await asyncio.sleep(REPLY_S)
            if text == 2 or (text == 4 and maker.tries[4] == 1):
                raise EngineLost("engine_error")

        maker = Maker(behave)
        outcomes = asyncio.run(ask_all(make_engine(maker, attempts=3), range(5)))
        assert outcomes[2].reason == "engine_error"
        assert outcomes[:2] + outcomes[3:] == replies([0, 1, 3, 4])
        assert (maker.starts, maker.tries[2], maker.tries[4]) == (1, 3, 2)

    def test_a_text_that_nobody_waits_for_is_taken_out_of_the_engine(self):
        maker = Maker()
        engine = make_engine(maker)

        async def script():
            tasks = [asyncio.create_task(ask(engine, text)) for text in range(3)]
            while len(maker.seen_together) < 3:
                await asyncio.sleep(0)
            tasks[1].cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            return outcomes, maker.engines[0].under_way, await ask(engine, 9)

        outcomes, under_way, after = asyncio.run(script())
        assert isinstance(outcomes[1], asyncio.CancelledError)
        assert [outcomes[0], outcomes[2], after] == replies([0, 2, 9])
        assert under_way == []


class TestClose:
    def test_it_shuts_the_engine_down_once(self):
        maker = Maker()
        engine = make_engine(maker)
        asyncio.run(ask_all(engine, [1]))
        engine.close()
        assert maker.engines[0].closed_at is not None
        engine.close()

    def test_where_none_was_started_there_is_nothing_to_do(self):
        maker = Maker()
        make_engine(maker).close()
        assert maker.starts == 0


class TestGate:
    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(
            st.tuples(
                st.booleans(),  # alone
                st.integers(0, 8),  # when it comes
                st.integers(0, 5),  # how long it stays
                st.sampled_from(["leaves", "breaks", "is cancelled"]),
            ),
            max_size=14,
        )
    )
    def test_alone_means_alone_and_everybody_gets_in(self, visits):
        async def script():
            gate, inside, entered = Gate(), [], []

            async def visit(number, alone, arrival, stay, end):
                for _ in range(arrival):
                    await asyncio.sleep(0)
                async with gate.exclusive() if alone else gate.shared():
                    inside.append((number, alone))
                    entered.append(number)
                    try:
                        for _ in range(stay + 1):
                            await asyncio.sleep(0)
                            assert len(inside) == 1 or not any(is_alone for _, is_alone in inside)
                        if end == "breaks":
                            raise ConnectionError
                    finally:
                        inside.remove((number, alone))

            tasks = [asyncio.create_task(visit(i, *one)) for i, one in enumerate(visits)]
            for _ in range(6):
                await asyncio.sleep(0)
            for task, one in zip(tasks, visits, strict=True):
                if one[-1] == "is cancelled":
                    task.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
            return outcomes, entered

        outcomes, entered = asyncio.run(script())
        for number, (outcome, visit) in enumerate(zip(outcomes, visits, strict=True)):
            if visit[-1] == "is cancelled":
                assert outcome is None or isinstance(outcome, asyncio.CancelledError)
            else:
                assert number in entered
                assert (type(outcome) is ConnectionError) == (visit[-1] == "breaks")

    def test_nobody_overtakes_one_who_waits_to_be_alone(self):
        async def script():
            gate, entered, leave = Gate(), [], asyncio.Event()

            async def visit(name, way, until):
                async with way():
                    entered.append(name)
                    await until.wait()

            free = asyncio.Event()
            free.set()
            tasks = []
            for name, way, until in (
                ("first", gate.shared, leave),
                ("alone", gate.exclusive, free),
                ("late", gate.shared, free),
            ):
                tasks.append(asyncio.create_task(visit(name, way, until)))
                await asyncio.sleep(0.001)
            assert entered == ["first"]
            leave.set()
            await asyncio.gather(*tasks)
            return entered

        assert asyncio.run(script()) == ["first", "alone", "late"]
