"""Starts a teacher's vLLM engines, each of the kind that suits the machine."""

from __future__ import annotations

from contextlib import suppress

from llkd_ray.child_engine import ChildEngine
from llkd_ray.engine_requests import RunningEngine
from llkd_ray.teacher_config import TeacherConfig
from llkd_ray.vllm_async import AsyncEngine
from llkd_ray.vllm_settings import is_one_process


class VllmStart:
    """Starts an engine whenever it is called."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self.teacher = teacher
        self._begun: ChildEngine | None = None

    def begin(self) -> None:
        """Begin with what a start on CPUs can do ahead; the next engine will be there sooner."""
        if is_one_process(self.teacher):
            with suppress(OSError):  # no room for a process now; there may be when it is needed
                self._begun = ChildEngine(self.teacher)

    def __call__(self) -> RunningEngine:
        """Raises RuntimeError with the root cause where the engine does not start."""
        if not is_one_process(self.teacher):
            return AsyncEngine.start(self.teacher)
        engine, self._begun = self._begun or ChildEngine(self.teacher), None
        engine.start()
        return engine

    def close(self) -> None:
        """Put away what was begun and never used."""
        if self._begun is not None:
            self._begun.shutdown()
            self._begun = None
