"""An engine that dies, hangs or does not start costs no answer, save that of the text that kills engines.

The engines are fakes with the interface of a running one; no process is started, and time is that of a clock
which jumps to the next moment at which something happens.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import selectors
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import SimpleNamespace
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
to_a_real_thread = asyncio.to_thread


class Clock(selectors.DefaultSelector):
    """Instead of waiting for the next moment, an event loop on it makes it now."""

    now = 0.0
    thread_s = 0.0
    """How long what is done in a thread takes."""

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            self.now += timeout
            timeout = 0
        return super().select(timeout)

    async def to_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        await asyncio.sleep(self.thread_s)
        return result


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(asyncio, "to_thread", clock.to_thread)
    return clock


def run(script: Coroutine[Any, Any, Any], clock: Clock | None = None) -> Any:
    """What a script comes to, and no time passes."""
    clock = clock or Clock()

    def loop() -> asyncio.AbstractEventLoop:
        made = asyncio.SelectorEventLoop(clock)
        made.time = lambda: clock.now
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(script)


class FakeEngine:
    """Replies to a text, a number that stands for its tokens, as ``behave`` lets it."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.is_dead = self.is_closed = False
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
            return EngineResponse(text)
        finally:
            self.under_way.remove(text)

    def shutdown(self) -> None:
        assert not self.is_closed, "an engine is shut down once"
        self.is_closed = True


Behave = Callable[[FakeEngine, int], Awaitable[None]]


async def reply(engine: FakeEngine, text: int) -> None:
    await asyncio.sleep(2)


def killed_by(*poison: int) -> Behave:
    """Engines that die of some texts."""

    async def behave(engine: FakeEngine, text: int) -> None:
        await asyncio.sleep(1 if text in poison else 2)
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

    def __call__(self) -> FakeEngine:
        self.starts += 1
        if self.failures:
            raise RuntimeError(self.failures.pop(0))
        self.engines.append(FakeEngine(self))
        return self.engines[-1]


def make_engine(
    start: Callable[[], Any], on_start: Callable[[float], None] = lambda seconds: None, **settings: Any
) -> Engine:
    return Engine(TeacherConfig(model="toy-model", **settings), on_start, start)


def ask(engine: Engine, text: int) -> Awaitable[Any]:
    return engine.with_retries(lambda: engine.generate([text], REQUEST))


async def ask_all(engine: Engine, texts: Sequence[int]) -> list[Any]:
    """Replies, or the exceptions in their place."""
    return await asyncio.gather(*(ask(engine, text) for text in texts), return_exceptions=True)


def replies(texts: Sequence[int]) -> list[EngineResponse]:
    return [EngineResponse(text) for text in texts]


class TestStart:
    @pytest.mark.parametrize("failures", [0, 1])
    def test_once_for_all_and_only_when_it_is_needed(self, clock, failures):
        """Memory may be short for a moment."""
        clock.thread_s = 30
        maker, took = Maker(failures=["out of memory"] * failures), []
        engine = make_engine(maker, took.append)
        assert maker.starts == 0
        assert run(ask_all(engine, range(20)), clock) == replies(range(20))
        assert maker.starts == 1 + failures
        assert took == [30], "only a start that came to something is reported"
        assert max(map(len, maker.seen_together)) == 20, "one text need not wait for another"

    def test_one_that_never_starts_is_given_up_for_good(self, clock):
        maker = Maker(failures=["out of memory"] * 100)
        engine = make_engine(maker, attempts=3)

        async def script():
            return [*await ask_all(engine, range(6)), *await ask_all(engine, [7])]

        for outcome in run(script(), clock):
            assert isinstance(outcome, TeacherDown)
            assert "'toy-model' did not start in 3 tries: out of memory" in str(outcome)
        assert (maker.starts, clock.now) == (3, 2 + 4), "each wait is longer than the one before"

    def test_one_that_starts_too_slowly_is_put_away_when_it_comes(self, monkeypatch):
        monkeypatch.setattr(asyncio, "to_thread", to_a_real_thread)
        maker, given_up = Maker(), threading.Event()

        def start() -> FakeEngine:
            given_up.wait()
            return maker()

        async def script():
            try:
                return await ask_all(make_engine(start, start_timeout_s=5), [1])
            finally:
                given_up.set()

        (outcome,) = run(script())
        assert isinstance(outcome, TeacherDown)
        assert "has not started within 5 s; raise teacher.start_timeout_s" in str(outcome)
        assert (maker.starts, maker.tries) == (1, {})
        assert maker.engines[0].is_closed

    def test_one_that_starts_in_the_moment_in_which_patience_ends(self, monkeypatch):
        maker = Maker()

        async def late(start, timeout):
            await start
            raise TimeoutError

        monkeypatch.setattr(engine_module.asyncio, "wait_for", late)
        (outcome,) = run(ask_all(make_engine(maker), [1]))
        assert isinstance(outcome, TeacherDown)
        assert maker.engines[0].is_closed


class TestDeath:
    @settings(deadline=None, max_examples=60)
    @given(
        kills=st.dictionaries(st.integers(0, 11), st.sampled_from([1, 4]), max_size=4).filter(
            lambda kills: sum(kills.values()) <= 8  # with more losses in a row, texts are not the cause
        ),
        arrival_N=st.lists(st.integers(0, 6), min_size=12, max_size=12),
        cancelled=st.dictionaries(st.integers(0, 11), st.integers(0, 15), max_size=4),
    )
    def test_whenever_texts_come_or_go_only_those_that_kill_fail(self, kills, arrival_N, cancelled):
        """A text that kills each engine that it meets fails after four; all others have a reply."""
        left = Counter(kills)

        async def behave(engine: FakeEngine, text: int) -> None:
            await asyncio.sleep(1 if text in kills else 2)
            if left[text] and not engine.is_dead:
                engine.is_dead = True
                left[text] -= kills[text] == 1

        maker = Maker(behave)
        engine = make_engine(maker, attempts=4)

        async def later(text: int) -> Any:
            await asyncio.sleep(arrival_N[text] * 0.7)
            return await ask(engine, text)

        async def script():
            tasks = [asyncio.create_task(later(text)) for text in range(12)]
            for text, when in cancelled.items():
                asyncio.get_running_loop().call_later(when * 0.6, tasks[text].cancel)
            return await asyncio.gather(*tasks, return_exceptions=True)

        for text, outcome in enumerate(run(script())):
            if isinstance(outcome, asyncio.CancelledError):
                assert text in cancelled
            elif kills.get(text) == 4:
                assert isinstance(outcome, TextFailed)
                assert (outcome.reason, maker.tries[text]) == ("engine_died", 4)
            else:
                assert outcome == EngineResponse(text)
                assert maker.tries[text] <= 2 + (text in kills)
        assert all(one.is_closed for one in maker.engines[:-1]), "only the last one is kept"
        seen: Counter[int] = Counter()
        for *beside, text in maker.seen_together:
            assert not (beside and seen[text]), f"text {text} is asked again, and not alone"
            assert all(seen[other] == 1 for other in beside), f"text {text} is asked beside a suspect"
            seen[text] += 1

    def test_engines_that_are_lost_whatever_they_are_asked(self):
        maker = Maker(killed_by(*range(100)))
        engine = make_engine(maker, attempts=2)

        async def script():
            return await ask_all(engine, range(10)), await ask_all(engine, [50])

        first, (later,) = run(script())
        assert maker.starts == 5, "more than two texts can lose"
        assert Counter(map(type, first)) == {TextFailed: 3, TeacherDown: 7}
        assert isinstance(later, TeacherDown)
        assert "5 engines of 'toy-model' were lost one after the other" in str(later)
        assert maker.tries[50] == 0

    @pytest.mark.parametrize(
        ("poison", "texts", "attempts", "starts"), [([1, 2], [1, 2, 3], 3, 7), ([1], [1, 0] * 6, 2, 13)]
    )
    def test_two_texts_that_kill_or_losses_with_replies_between_them_are_no_reason_to_give_up(
        self, poison, texts, attempts, starts
    ):
        maker = Maker(killed_by(*poison))
        engine = make_engine(maker, attempts=attempts)

        async def script():
            return [(await ask_all(engine, [text]))[0] for text in texts]

        for text, outcome in zip(texts, run(script()), strict=True):
            assert isinstance(outcome, TextFailed) if text in poison else outcome == EngineResponse(text)
        assert maker.starts == starts


class TestHang:
    def test_silence_is_found_out(self, clock):
        async def first_hangs(engine, text):
            await (asyncio.Event().wait() if engine is maker.engines[0] else reply(engine, text))

        maker = Maker(first_hangs)
        assert run(ask_all(make_engine(maker, timeout_s=60), range(6)), clock) == replies(range(6))
        assert [one.is_closed for one in maker.engines] == [True, False]
        assert clock.now == pytest.approx(60 + 6 * 2), "then one by one"

    def test_not_before_the_others_have_their_replies(self, clock):
        async def behave(engine, text):
            if text == 0:
                await asyncio.Event().wait()
            await asyncio.sleep(text * 5)  # one reply after the other, for longer than the limit

        maker = Maker(behave)
        outcomes = run(ask_all(make_engine(maker, timeout_s=60, attempts=2), range(26)), clock)
        assert outcomes[1:] == replies(range(1, 26))
        assert isinstance(outcomes[0], TextFailed)
        assert outcomes[0].reason == "engine_hung"
        assert maker.tries == {0: 2} | dict.fromkeys(range(1, 26), 1)
        assert clock.now == pytest.approx(25 * 5 + 60 + 60)

    def test_a_long_queue_and_a_pause_between_two_tickets_are_no_hang(self, clock):
        async def one_at_a_time(engine, text):
            async with turn:
                await asyncio.sleep(5)

        async def script():
            first = await ask_all(engine, range(25))
            await asyncio.sleep(600)
            return first + await ask_all(engine, [25])

        turn, maker = asyncio.Lock(), Maker(one_at_a_time)
        engine = make_engine(maker, timeout_s=60)
        assert run(script(), clock) == replies(range(26))
        assert maker.starts == 1

    def test_what_a_hung_engine_says_when_it_is_put_away_is_of_no_interest(self, clock, caplog):
        async def until_closed(engine, text):
            while not engine.is_closed:
                await asyncio.sleep(0.7)  # never in the moment in which patience ends
            engine.is_dead = True

        clock.thread_s = 10
        engine = make_engine(Maker(until_closed), timeout_s=60, attempts=1)
        with caplog.at_level(logging.ERROR):
            outcomes = run(ask_all(engine, range(3)), clock)
            gc.collect()  # a task complains of an exception that nobody took when it is collected
        assert [outcome.reason for outcome in outcomes] == ["engine_hung"] * 3
        assert caplog.records == []


def test_a_refused_request_is_not_made_again_and_an_error_that_the_engine_lives_through_is():
    async def behave(engine, text):
        await asyncio.sleep(1)
        if text == 1:
            raise TextFailed("refused_by_engine", "the prompt is too long")
        if text == 2 or (text == 3 and maker.tries[3] == 1):
            raise EngineLost("engine_error")

    maker = Maker(behave)
    answered, refused, failed, again = run(ask_all(make_engine(maker, attempts=3), range(4)))
    assert [answered, again] == replies([0, 3])
    assert (refused.reason, str(refused)) == ("refused_by_engine", "the prompt is too long")
    assert failed.reason == "engine_error"
    assert (maker.starts, maker.tries) == (1, {0: 1, 1: 1, 2: 3, 3: 2})


def test_a_text_that_nobody_waits_for_is_taken_out_of_the_engine():
    maker = Maker()
    engine = make_engine(maker)

    async def script():
        tasks = [asyncio.create_task(ask(engine, text)) for text in range(3)]
        while len(maker.seen_together) < 3:
            await asyncio.sleep(0)
        tasks[1].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes, maker.engines[0].under_way, await ask(engine, 9)

    outcomes, under_way, after = run(script())
    assert isinstance(outcomes[1], asyncio.CancelledError)
    assert [outcomes[0], outcomes[2], after] == replies([0, 2, 9])
    assert under_way == []


@pytest.mark.parametrize("asked", [[], [1]])
def test_close_shuts_down_once_what_was_started(asked):
    maker = Maker()
    engine = make_engine(maker)
    run(ask_all(engine, asked))
    for _ in range(2):
        engine.close()
    assert [one.is_closed for one in maker.engines] == [True] * len(asked)


def test_nobody_overtakes_one_who_waits_to_be_alone():
    async def script():
        gate, entered = Gate(), []

        async def visit(name, way, stay):
            async with way():
                entered.append(name)
                await asyncio.sleep(stay)

        tasks = []
        for visitor in (("first", gate.shared, 9), ("alone", gate.exclusive, 0), ("late", gate.shared, 0)):
            tasks.append(asyncio.create_task(visit(*visitor)))
            await asyncio.sleep(1)
        assert entered == ["first"]
        await asyncio.gather(*tasks)
        return entered

    assert run(script()) == ["first", "alone", "late"]
