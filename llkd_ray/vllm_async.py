"""vLLM's asynchronous engine: on GPUs, in several parts, and on CPUs whose threads are bound to cores."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from llkd_ray.answers import TextFailed
from llkd_ray.engine_requests import EngineDied, EngineLost, Reply, Wish
from llkd_ray.root_cause import root_cause
from llkd_ray.teacher_config import TeacherConfig
from llkd_ray.vllm_requests import prompt_of, refusals, reply_of, sampling_of
from llkd_ray.vllm_settings import engine_arguments


class AsyncEngine:
    """A :class:`~llkd_ray.engine_requests.RunningEngine` around ``vllm``, an AsyncLLM."""

    def __init__(self, vllm: Any) -> None:
        self.vllm = vllm
        self._numbers = itertools.count()

    @classmethod
    def start(cls, teacher: TeacherConfig) -> AsyncEngine:
        """Raises RuntimeError with the root cause where it does not start."""
        # Read by vLLM when it is imported.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if not teacher.gpus and teacher.parts > 1:
            # By default vLLM gives each part a memory node of its own and refuses where there is but one.
            cores = np.array_split(sorted(os.sched_getaffinity(0)), teacher.parts)
            bound = "|".join(",".join(map(str, own)) for own in cores)
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        with _listening() as log:
            try:
                arguments = AsyncEngineArgs(**engine_arguments(teacher))
                # By default it would take batches as small as a server's that answers at once.
                return cls(AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS))
            except Exception as error:
                raise RuntimeError(root_cause(log) or f"{type(error).__name__}: {error}") from error

    async def reply(self, token_ids: Sequence[int], wish: Wish) -> Reply:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        request, sampling = prompt_of(token_ids), sampling_of(wish)
        last = None
        try:
            async for output in self.vllm.generate(request, sampling, f"text-{next(self._numbers)}"):
                last = output
        except EngineDeadError:
            raise EngineDied from None
        except EngineGenerateError:
            raise EngineLost("engine_error") from None
        except refusals() as refusal:
            raise TextFailed("refused_by_engine", str(refusal)) from None
        return reply_of(wish, last)

    def shutdown(self) -> None:
        self.vllm.shutdown()


@contextmanager
def _listening() -> Iterator[IO[bytes] | None]:
    """A file that also gets what the engine's processes, which inherit it, write to stderr.

    vLLM tells the root cause of a failed start there and nowhere else. With LLKD_VERBOSE, people read it.
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
