"""The two kinds of vLLM engines, and which of them is used on a machine.

vLLM's own asynchronous engine imports vLLM in both processes, one after the other, and passes each request
and reply through several layers in the actor. With :class:`ChildEngine`, the actor sends token ids and
receives probabilities.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import IO, Any

import numpy as np

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.base import TextFailed
from llkd_ray.teacher.vllm.requests import (
    EngineDied,
    EngineLost,
    EngineRequest,
    EngineResponse,
    RunningEngine,
    engine_arguments,
    engine_prompt,
    is_one_process,
    refusals,
    response_from,
    sampling_params,
    threads_of,
)


class EngineStarter:
    """Starts a new engine at each call."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self.teacher = teacher
        self._prestarted: ChildEngine | None = None

    def prestart(self) -> None:
        """Start the preparations that a CPU engine allows in advance; the next engine will start faster."""
        if is_one_process(self.teacher):
            with suppress(OSError):  # no resources for a process now; retried when the engine is needed
                self._prestarted = ChildEngine(self.teacher)

    def __call__(self) -> RunningEngine:
        """Raises RuntimeError with the root cause where the engine does not start."""
        if not is_one_process(self.teacher):
            return AsyncEngine.start(self.teacher)
        engine, self._prestarted = self._prestarted or ChildEngine(self.teacher), None
        engine.start()
        return engine

    def close(self) -> None:
        """Shut down a prestarted engine that was never used."""
        if self._prestarted is not None:
            self._prestarted.shutdown()
            self._prestarted = None


COMMAND = (sys.executable, "-m", "llkd_ray.teacher.vllm.child_main")


class ChildEngine:
    """A :class:`~llkd_ray.teacher.vllm.requests.RunningEngine`, once :meth:`start` has returned.

    Its process imports vLLM immediately, which is most of the work that does not need the settings.
    """

    def __init__(self, teacher: TeacherConfig) -> None:
        self.teacher = teacher
        self._connection, theirs = Pipe()
        # vLLM reports some causes of a failed start only on stderr. With LLKD_VERBOSE, the user sees stderr.
        self._log = None if os.environ.get("LLKD_VERBOSE") else tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=self._log,
                env=_environment(teacher),
            )
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, asyncio.Future[EngineResponse | str]] = {}
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_dead = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Load the model. Raises RuntimeError with the root cause where that fails."""
        try:
            self._connection.send(self.teacher)
            reason = self._connection.recv()
        except (EOFError, OSError):
            reason = root_cause(self._log) or f"its process ended with status {self._process.wait()}"
        if reason is not None:
            self.shutdown()
            raise RuntimeError(reason)
        for work in (self._send, self._receive):
            threading.Thread(target=work, name="engine", daemon=True).start()

    async def generate(self, token_ids: Sequence[int], request: EngineRequest) -> EngineResponse:
        self._loop = asyncio.get_running_loop()
        if self._is_dead:
            raise EngineDied
        number = next(self._numbers)
        self._waiting[number] = self._loop.create_future()
        self._outbox.put((number, list(token_ids), request))
        try:
            said = await self._waiting[number]
        finally:
            if self._waiting.pop(number, None) is not None:
                self._outbox.put((number, None, None))
        if isinstance(said, str):
            raise TextFailed("refused_by_engine", said)
        return said

    def shutdown(self) -> None:
        # There is no state to save, and a hung process reacts to nothing else.
        self._process.kill()
        self._process.wait()
        self._outbox.put(None)
        if self._log is not None:
            self._log.close()

    def _send(self) -> None:
        """Runs in a thread, so that a hung process, which reads nothing more, blocks only this thread."""
        with suppress(OSError):  # it is dead, which the other thread reports
            while (request := self._outbox.get()) is not None:
                self._connection.send(request)

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._call_in_loop(self._resolve, self._connection.recv())
        self._is_dead = True
        self._call_in_loop(self._fail_all)

    def _call_in_loop(self, callback: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nothing waits
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback, *arguments)

    def _resolve(self, responses: Sequence[tuple[int, EngineResponse | str]]) -> None:
        for number, said in responses:
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_result(said)

    def _fail_all(self) -> None:
        while self._waiting:
            _, future = self._waiting.popitem()
            if not future.done():
                future.set_exception(EngineDied())


def _environment(teacher: TeacherConfig) -> dict[str, str]:
    """The child's environment: vLLM reads it on import, OpenMP on load."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Ray sets this to 1 for an actor of less than a CPU.
        "OMP_NUM_THREADS": str(threads_of(teacher)),
        # A spinning thread takes a core away from the student or from another thread.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


class AsyncEngine:
    """A :class:`~llkd_ray.teacher.vllm.requests.RunningEngine` around ``vllm``, an AsyncLLM."""

    def __init__(self, vllm: Any) -> None:
        self.vllm = vllm
        self._numbers = itertools.count()

    @classmethod
    def start(cls, teacher: TeacherConfig) -> AsyncEngine:
        """Raises RuntimeError with the root cause where it does not start."""
        # vLLM reads it on import.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if not teacher.n_gpus and teacher.parts > 1:
            # By default vLLM assigns each part its own NUMA node and fails where there is only one.
            cores = np.array_split(sorted(os.sched_getaffinity(0)), teacher.parts)
            bound = "|".join(",".join(map(str, own)) for own in cores)
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        with _captured_stderr() as log:
            try:
                arguments = AsyncEngineArgs(**engine_arguments(teacher))
                # The default usage context has a server's smaller batch sizes, for low latency.
                return cls(AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS))
            except Exception as error:
                raise RuntimeError(root_cause(log) or f"{type(error).__name__}: {error}") from error

    async def generate(self, token_ids: Sequence[int], request: EngineRequest) -> EngineResponse:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt, sampling = engine_prompt(token_ids), sampling_params(request)
        last = None
        try:
            async for output in self.vllm.generate(prompt, sampling, f"text-{next(self._numbers)}"):
                last = output
        except EngineDeadError:
            raise EngineDied from None
        except EngineGenerateError:
            raise EngineLost("engine_error") from None
        except refusals() as refusal:
            raise TextFailed("refused_by_engine", str(refusal)) from None
        return response_from(request, last)

    def shutdown(self) -> None:
        self.vllm.shutdown()


@contextmanager
def _captured_stderr() -> Iterator[IO[bytes] | None]:
    """A file that also receives the stderr of the engine's processes, which inherit it.

    vLLM reports the root cause of a failed start only there. With LLKD_VERBOSE, the user reads stderr.
    """
    if os.environ.get("LLKD_VERBOSE"):
        yield None
        return
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


def root_cause(log: IO[bytes] | None) -> str:
    """The first error that a log of nested tracebacks ends in, without its time and location; or empty."""
    if log is None:
        return ""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").splitlines()
    errors = [found[1] for line in lines if (found := re.search(r"\b(\w*(?:Error|Exception): .+)$", line))]
    if not errors:
        return ""
    quoted = re.search(r"Worker failed with error '(.+)', please check", errors[0])
    return (quoted[1] if quoted else errors[0])[:500]
