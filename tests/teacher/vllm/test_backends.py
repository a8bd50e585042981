"""Which kind of engine a teacher gets, what is begun ahead of it, and an engine in a child process.

The child is a stub that speaks its language; vLLM's own asynchronous engine is in test_vllm_async.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import TextFailed
from llkd_ray.teacher.vllm import backends
from llkd_ray.teacher.vllm.backends import ChildEngine, EngineStarter
from llkd_ray.teacher.vllm.requests import EngineDied, EngineResponse, NextToken, threads_of

STUB = Path(__file__).parents[2] / "stub_child.py"
REQUEST = NextToken((1, 2))


def make_engine(**engine: Any) -> ChildEngine:
    """``engine``: what the stub is to do, in the settings that are vLLM's own."""
    return ChildEngine(TeacherConfig(model="toy-model", engine=engine))


@pytest.fixture(autouse=True)
def stub(monkeypatch) -> Iterator[None]:
    """The stub instead of vLLM's process; none may be left."""
    monkeypatch.setattr(backends, "COMMAND", (sys.executable, str(STUB)))
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


@pytest.fixture
def engine() -> Iterator[ChildEngine]:
    made = make_engine()
    made.start()
    yield made
    made.shutdown()


class TestStart:
    def test_the_child_gets_the_settings_and_a_surrounding_of_its_own(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "77")
        monkeypatch.setattr(sys, "path", [*sys.path, "/a/place/of/a/job"])
        engine = make_engine(tell=["OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "PYTHONPATH"])
        engine.start()
        try:
            threads, processes, path = asyncio.run(engine.generate([0], REQUEST)).answers
        finally:
            engine.shutdown()
        assert threads == str(threads_of(engine.teacher))
        assert processes == "0"
        assert "/a/place/of/a/job" in path.split(os.pathsep), "a job's own code is in the workers' path alone"
        assert os.environ["OMP_NUM_THREADS"] == "77"

    @pytest.mark.parametrize(
        ("engine", "reason"),
        [
            ({"refuse": "ValueError: no such model"}, "^ValueError: no such model$"),
            ({"write": "ERROR [core.py:9] MemoryError: none is left\n", "die": 3}, "^MemoryError: none is"),
            ({"die": 3}, "^its process ended with status 3$"),
        ],
        ids=["it says why", "it wrote why", "nobody knows why"],
    )
    def test_the_reason_is_told_where_it_does_not(self, monkeypatch, engine, reason):
        monkeypatch.delenv("LLKD_VERBOSE", raising=False)
        with pytest.raises(RuntimeError, match=reason):
            make_engine(**engine).start()

    def test_whoever_wants_to_read_it_may(self, monkeypatch, capfd):
        for verbose, is_read in (("", False), ("1", True)):
            monkeypatch.setenv("LLKD_VERBOSE", verbose)
            with pytest.raises(RuntimeError, match="status 3" if verbose else "too small"):
                make_engine(write="MemoryError: too small\n", die=3).start()
            assert ("too small" in capfd.readouterr().err) == is_read

    def test_one_that_was_begun_and_is_not_needed(self):
        make_engine().shutdown()


class TestReplies:
    def test_each_gets_its_own_whatever_their_order_and_a_refusal_is_of_one_text(self, engine):
        async def script():
            asked = (engine.generate([number], REQUEST) for number in (*range(200), -1))
            return await asyncio.gather(*asked, return_exceptions=True)

        *replies, refused = asyncio.run(script())
        assert replies == [EngineResponse(number, probs=(1.0, 2.0)) for number in range(200)]
        assert isinstance(refused, TextFailed)
        assert (refused.reason, str(refused)) == ("refused_by_engine", "less than nothing")

    def test_one_that_nobody_waits_for_is_taken_out(self, engine):
        async def script():
            late = asyncio.ensure_future(engine.generate([10_000], REQUEST))  # the stub keeps these back
            await engine.generate([1], REQUEST)
            late.cancel()
            await asyncio.wait({late})
            return await engine.generate([1], REQUEST)

        assert asyncio.run(script()).answers == ("taken out: 1",)

    def test_more_at_once_than_any_pipe_holds_keeps_nobody_waiting(self, engine):
        async def script():
            os.kill(engine.pid, signal.SIGSTOP)
            asked = [asyncio.ensure_future(engine.generate([n] * 50_000, REQUEST)) for n in range(20)]
            await asyncio.sleep(0)  # all are on their way, and the child reads none
            os.kill(engine.pid, signal.SIGCONT)  # never, if one of them held up this loop
            return [reply.cached_tokens for reply in await asyncio.gather(*asked)]

        assert asyncio.run(script()) == list(range(20))


class TestEnd:
    @pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
    def test_a_death_is_told_to_all_who_wait_and_all_who_come(self, engine, blow):
        async def script():
            asked = [asyncio.ensure_future(engine.generate([10_000], REQUEST)) for _ in range(3)]
            await engine.generate([1], REQUEST)
            os.kill(engine.pid, blow)
            first = await asyncio.gather(*asked, return_exceptions=True)
            (later,) = await asyncio.gather(engine.generate([1], REQUEST), return_exceptions=True)
            return [*first, later]

        assert [type(one) for one in asyncio.run(script())] == [EngineDied] * 4

    def test_one_that_hangs_is_put_away(self, engine):
        os.kill(engine.pid, signal.SIGSTOP)

        async def script():
            asked = asyncio.ensure_future(engine.generate([1] * 1_000_000, REQUEST))
            await asyncio.sleep(0)
            while engine._outbox.qsize():  # until the sender has it
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.shutdown)
            return await asyncio.gather(asked, return_exceptions=True)

        (outcome,) = asyncio.run(script())
        assert isinstance(outcome, EngineDied)
        assert not psutil.pid_exists(engine.pid)

    def test_replies_that_come_when_the_loop_is_closed_are_nobodys(self, engine):
        async def script():
            late = asyncio.ensure_future(engine.generate([10_000], REQUEST))
            await engine.generate([1], REQUEST)
            late.cancel()

        asyncio.run(script())
        os.kill(engine.pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(engine.pid)], timeout=10)
        with pytest.raises(EngineDied):
            asyncio.run(engine.generate([1], REQUEST))


# --- which one


class FakeChild:
    def __init__(self, teacher: TeacherConfig) -> None:
        self.teacher, self.calls = teacher, list[str]()
        CHILDREN.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


CHILDREN: list[FakeChild] = []
"""All that were made in a test."""


@pytest.fixture
def start(monkeypatch):
    """A starter on a machine where engines on CPUs are one process, or where vLLM decides."""

    def make(in_one_process: bool = True, child: Any = FakeChild) -> EngineStarter:
        monkeypatch.setattr(backends, "is_one_process", lambda teacher: in_one_process)
        monkeypatch.setattr(backends, "ChildEngine", child)
        monkeypatch.setattr(backends.AsyncEngine, "start", lambda teacher: ("vLLM's own", teacher.model))
        return EngineStarter(TeacherConfig(model="toy-model"))

    CHILDREN.clear()
    return make


def test_what_was_begun_is_used_once(start):
    starter = start()
    starter.prestart()
    assert [one.calls for one in CHILDREN] == [[]], "it is not loaded before it is needed"
    first, second = starter(), starter()
    assert [first, second] == CHILDREN
    assert [one.calls for one in CHILDREN] == [["start"]] * 2
    starter.close()
    assert [one.calls for one in CHILDREN] == [["start"]] * 2, "those are their user's to put away"


def test_what_was_begun_and_never_used_is_put_away(start):
    starter = start()
    starter.prestart()
    starter.close()
    starter.close()
    assert [one.calls for one in CHILDREN] == [["shutdown"]]


def test_no_room_to_begin_is_no_reason_to_fail_before_it_is_needed(start):
    def child(teacher: TeacherConfig) -> FakeChild:
        raise OSError("no memory for a process")

    starter = start(child=child)
    starter.prestart()
    with pytest.raises(OSError, match="no memory"):
        starter()


def test_where_vllm_decides_nothing_is_begun(start):
    starter = start(in_one_process=False)
    starter.prestart()
    assert starter() == ("vLLM's own", "toy-model")
    starter.close()
    assert CHILDREN == []
