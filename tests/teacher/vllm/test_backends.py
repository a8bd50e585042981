"""Which kind of engine a teacher gets, and what is begun ahead of it. Engines are fakes."""

from __future__ import annotations

from typing import Any

import pytest

from llkd_ray.config.teacher import TeacherConfig
from llkd_ray.teacher.vllm import backends
from llkd_ray.teacher.vllm.backends import EngineStarter


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
