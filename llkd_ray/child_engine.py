"""A vLLM engine on CPUs in a child process that is ours: see ``vllm_child`` for the other end.

vLLM's own asynchronous engine imports vLLM in both processes, one after the other, and takes each request
and reply through several layers on the actor's side. Here the actor sends token ids and gets probabilities.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from llkd_ray.answers import TextFailed
from llkd_ray.engine_requests import EngineDied, Reply, Wish
from llkd_ray.root_cause import root_cause
from llkd_ray.teacher_config import TeacherConfig
from llkd_ray.vllm_settings import threads_of

COMMAND = (sys.executable, "-m", "llkd_ray.vllm_child")


class ChildEngine:
    """A :class:`~llkd_ray.engine_requests.RunningEngine`, once :meth:`start` has returned.

    Its process begins at once to import vLLM, which is most of what it does before it needs the settings.
    """

    def __init__(self, teacher: TeacherConfig) -> None:
        self.teacher = teacher
        self._connection, theirs = Pipe()
        # vLLM tells some causes of a failed start there and nowhere else. With LLKD_VERBOSE, people read it.
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
        self._waiting: dict[int, asyncio.Future[Reply | str]] = {}
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

    async def reply(self, token_ids: Sequence[int], wish: Wish) -> Reply:
        self._loop = asyncio.get_running_loop()
        if self._is_dead:
            raise EngineDied
        number = next(self._numbers)
        self._waiting[number] = self._loop.create_future()
        self._outbox.put((number, list(token_ids), wish))
        try:
            said = await self._waiting[number]
        finally:
            if self._waiting.pop(number, None) is not None:
                self._outbox.put((number, None, None))
        if isinstance(said, str):
            raise TextFailed("refused_by_engine", said)
        return said

    def shutdown(self) -> None:
        # Nothing is left to be saved, and one that hangs hears nothing else.
        self._process.kill()
        self._process.wait()
        self._outbox.put(None)
        if self._log is not None:
            self._log.close()

    def _send(self) -> None:
        """In a thread: a process that hangs takes nothing more, and then this waits, and nobody else."""
        with suppress(OSError):  # it is dead, which the other thread tells
            while (request := self._outbox.get()) is not None:
                self._connection.send(request)

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._tell(self._settle, self._connection.recv())
        self._is_dead = True
        self._tell(self._bury)

    def _tell(self, what: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            if self._loop is not None:
                self._loop.call_soon_threadsafe(what, *arguments)

    def _settle(self, replies: Sequence[tuple[int, Reply | str]]) -> None:
        for number, said in replies:
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_result(said)

    def _bury(self) -> None:
        while self._waiting:
            _, future = self._waiting.popitem()
            if not future.done():
                future.set_exception(EngineDied())


def _environment(teacher: TeacherConfig) -> dict[str, str]:
    """The child's environment: vLLM reads it when it is imported, OpenMP when it is loaded."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Ray sets its own, 1 for an actor of less than a CPU.
        "OMP_NUM_THREADS": str(threads_of(teacher)),
        # A thread that spins while it waits takes the core from the student, or from another thread.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
