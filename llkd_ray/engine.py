"""A vLLM engine that may die: started when it is first needed, started anew when it is lost.

The engine lives in processes of its own below the teacher's actor, so that its death is not the actor's: the
actor knows which texts were under way, keeps the answers it has, and finds the text that kills engines.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from llkd_ray.answers import TeacherDown, TextFailed
from llkd_ray.teacher_config import TeacherConfig
from llkd_ray.vllm_start import start_vllm

logger = logging.getLogger(__name__)
_request_numbers = itertools.count()
T = TypeVar("T")


class EngineLost(Exception):
    """The engine died or hung with the request; it may be the text's doing, or not."""


class Gate:
    """Lets many in together, or one alone."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
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
    async def alone(self) -> AsyncIterator[None]:
        async with self._door:
            await self._empty.wait()
            yield


class Engine:
    """One engine at a time, on demand. ``start`` gives a new one, with vLLM's ``generate`` and ``shutdown``.

    ``on_start`` hears the seconds that each start took. Belongs to one event loop.
    """

    def __init__(
        self,
        teacher: TeacherConfig,
        on_start: Callable[[float], None],
        start: Callable[[TeacherConfig], Any] | None = None,
    ) -> None:
        self.teacher = teacher
        self._on_start = on_start
        self._start = start or start_vllm
        self._engine: Any = None
        self._starting = asyncio.Lock()
        self._gate = Gate()
        self._last_reply = 0.0
        self._losses = 0
        """Engines lost since the last reply."""
        self._down: TeacherDown | None = None

    async def steadily(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask``, all requests for one text, comes to; tried again where the engine is lost under it.

        From its second try on a text is asked with nothing else under way: then a lost engine is its doing,
        and the texts that were under way with it go free. Raises :class:`TextFailed` after
        ``teacher.attempts`` tries, and :class:`TeacherDown` where no engine starts, or one after the other is
        lost without a reply; from then on always.
        """
        reason = ""
        for attempt in range(self.teacher.attempts):
            try:
                async with self._gate.alone() if attempt else self._gate.together():
                    return await ask()
            except EngineLost as lost:
                reason = str(lost)
        raise TextFailed(reason)

    async def ask(self, token_ids: Sequence[int], sampling: Any) -> Any:
        """vLLM's finished output of one request.

        Raises :class:`EngineLost` where the engine is gone or has given nobody a reply for
        ``teacher.timeout_s``, and :class:`TextFailed` where it refuses the request.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        engine = await self._running()
        began = time.monotonic()
        generation = asyncio.ensure_future(_generate(engine, token_ids, sampling))
        try:
            while not generation.done():
                quiet = time.monotonic() - max(began, self._last_reply)
                if quiet >= self.teacher.timeout_s:
                    await self._lose(engine, f"no reply for {quiet:.0f} s")
                    raise EngineLost("engine_hung")
                await asyncio.wait({generation}, timeout=self.teacher.timeout_s - quiet)
            output = generation.result()
        except EngineDeadError:
            await self._lose(engine, "its process ended")
            raise EngineLost("engine_died") from None
        except EngineGenerateError:
            raise EngineLost("engine_error") from None
        except (VLLMClientError, ValueError) as refusal:  # vLLM's own check of a request
            raise TextFailed("refused_by_engine", str(refusal)) from None
        finally:
            generation.cancel()
        self._last_reply = time.monotonic()
        self._losses = 0
        return output

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    async def _running(self) -> Any:
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

    async def _started(self) -> Any:
        """A new engine, after several tries if need be: memory that is short now may be free in a moment."""
        said = ""
        gave_up = threading.Event()
        came: list[Any] = []

        def put_away() -> None:
            with suppress(IndexError):  # there is none, or the other has it
                came.pop().shutdown()

        def start() -> Any:
            engine = self._start(self.teacher)
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
                # A thread cannot be stopped: its engine is put away when it comes, or now if it just has.
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
            self._last_reply = time.monotonic()
            self._on_start(self._last_reply - began)
            return engine
        raise TeacherDown(
            f"teacher.model: the engine of {self.teacher.model!r} did not start in {self.teacher.attempts} "
            f"tries: {said}"
        )

    async def _lose(self, engine: Any, why: str) -> None:
        """Put an engine away, once, whoever finds it lost; the next request starts another."""
        async with self._starting:
            if engine is not self._engine:
                return
            self._engine = None
            self._losses += 1
            logger.warning("the engine of %s is lost: %s", self.teacher.model, why)
            await asyncio.to_thread(engine.shutdown)
        # Two texts that kill engines can lose so many in a row: more is not the texts' doing.
        if self._losses > 2 * self.teacher.attempts:
            self._down = TeacherDown(
                f"teacher.model: {self._losses} engines of {self.teacher.model!r} were lost one after the "
                f"other without a reply, the last because {why}"
            )
            raise self._down


async def _generate(engine: Any, token_ids: Sequence[int], sampling: Any) -> Any:
    from vllm.inputs.engine import tokens_input

    # A prompt that is "rendered" already: vLLM would take each plain one through a thread of its own.
    request = tokens_input(list(token_ids))
    last = None
    async for output in engine.generate(request, sampling, f"text-{next(_request_numbers)}"):
        last = output
    return last
