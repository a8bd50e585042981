"""An engine that may die: started on first use, and restarted after it is lost.

It runs in its own processes, children of the teacher's actor, so that the actor survives its death: the
actor knows which texts were in progress, keeps the answers it has, and identifies a text that kills engines.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import TeacherDown, TextFailed
from llkd_ray.teacher.vllm.requests import (
    EngineDied,
    EngineLost,
    EngineRequest,
    EngineResponse,
    RunningEngine,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Gate:
    """A lock that admits many shared holders, or one exclusive holder."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._door:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        async with self._door:
            await self._empty.wait()
            yield


class Engine:
    """One engine at a time, on demand. ``start`` returns a new one; it runs in a thread.

    ``on_start`` gets the seconds that each start took. Belongs to one event loop.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        on_start: Callable[[float], None],
        start: Callable[[], RunningEngine],
    ) -> None:
        self.teacher = teacher
        self._on_start = on_start
        self._start = start
        self._engine: RunningEngine | None = None
        self._starting = asyncio.Lock()
        self._gate = Gate()
        self._last_response = 0.0
        self._losses = 0
        """Engines lost since the last reply."""
        self._down: TeacherDown | None = None

    async def with_retries(self, attempt_once: Callable[[], Awaitable[T]]) -> T:
        """Result of ``attempt_once`` (all requests for one text), repeated where the engine is lost.

        Retries of a text run with no other text in progress: if the engine is lost again, this text is the
        cause, and texts that were in progress with it before are cleared. Raises :class:`TextFailed` after
        ``teacher.attempts`` tries, and :class:`TeacherDown` where no engine starts, or several in a row are
        lost without a reply; after that, always.
        """
        reason = ""
        for attempt in range(self.teacher.attempts):
            try:
                async with self._gate.exclusive() if attempt else self._gate.shared():
                    return await attempt_once()
            except EngineLost as lost:
                reason = str(lost)
        raise TextFailed(reason)

    async def generate(self, token_ids: Sequence[int], request: EngineRequest) -> EngineResponse:
        """The engine's reply to one request.

        Raises :class:`EngineLost` where the engine has died or has returned no reply at all for
        ``teacher.timeout_s``, and :class:`TextFailed` where it rejects the request.
        """
        engine = await self._running()
        began = time.monotonic()
        task = asyncio.ensure_future(engine.generate(token_ids, request))
        try:
            while not task.done():
                quiet = time.monotonic() - max(began, self._last_response)
                if quiet >= self.teacher.timeout_s:
                    await self._lose(engine, f"no reply for {quiet:.0f} s")
                    raise EngineLost("engine_hung")
                await asyncio.wait({task}, timeout=self.teacher.timeout_s - quiet)
            response = task.result()
        except EngineDied:
            await self._lose(engine, "its process ended")
            raise
        finally:
            task.cancel()
        self._last_response = time.monotonic()
        self._losses = 0
        return response

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def _running(self) -> RunningEngine:
        async with self._starting:
            if self._down is not None:
                raise self._down
            if self._engine is None:
                try:
                    self._engine = await self._started()
                except TeacherDown as down:
                    self._down = down
                    raise
            return self._engine

    async def _started(self) -> RunningEngine:
        """A new engine, with several tries if necessary: a lack of memory may be temporary."""
        said = ""
        gave_up = threading.Event()
        came: list[RunningEngine] = []

        def put_away() -> None:
            with suppress(IndexError):  # there is none, or the other caller took it
                came.pop().shutdown()

        def start() -> RunningEngine:
            engine = self._start()
            came.append(engine)
            if gave_up.is_set():
                put_away()
            return engine

        for attempt in range(self.teacher.attempts):
            if attempt:
                await asyncio.sleep(min(2.0**attempt, 60.0))
            began = time.monotonic()
            try:
                engine = await asyncio.wait_for(asyncio.to_thread(start), self.teacher.start_timeout_s)
            except TimeoutError:
                # A thread cannot be stopped: its engine is shut down once it has started, or now if it has.
                gave_up.set()
                put_away()
                raise TeacherDown(
                    f"teacher.model: the engine of {self.teacher.model!r} has not started within "
                    f"{self.teacher.start_timeout_s:g} s; raise teacher.start_timeout_s if it needs longer"
                ) from None
            except Exception as error:
                said = str(error).strip()
                logger.warning("the engine of %s did not start: %s", self.teacher.model, said)
                continue
            self._last_response = time.monotonic()
            self._on_start(self._last_response - began)
            return engine
        raise TeacherDown(
            f"teacher.model: the engine of {self.teacher.model!r} did not start in {self.teacher.attempts} "
            f"tries: {said}"
        )

    async def _lose(self, engine: RunningEngine, why: str) -> None:
        """Shut down a lost engine, once, regardless of who reports it; the next request starts another."""
        async with self._starting:
            if engine is not self._engine:
                return
            self._engine = None
            self._losses += 1
            logger.warning("the engine of %s is lost: %s", self.teacher.model, why)
            await asyncio.to_thread(engine.shutdown)
        # Two texts that kill engines can cause this many losses in a row: with more, texts are not the cause.
        if self._losses > 2 * self.teacher.attempts:
            self._down = TeacherDown(
                f"teacher.model: {self._losses} engines of {self.teacher.model!r} were lost one after the "
                f"other without a reply, the last because {why}"
            )
            raise self._down
