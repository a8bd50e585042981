"""What a driver hears of its run's parts while it waits; the parts themselves run in tests/cluster/."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from toys import make_config

from llkd_ray.cluster import Background
from llkd_ray.config.base import ConfigError
from llkd_ray.run import supervisor as run_module
from llkd_ray.run.supervisor import Run
from llkd_ray.teacher.base import TeacherDown


class Listener:
    """A display."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def update(self, line: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        self.shown = line, dict(rows)


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the selector says."""
    monkeypatch.setattr(run_module.ray, "get", lambda answer: answer)
    counts = {"labelled": 0, "trained": 0, "teacher_tokens": 0, "usage": {}}
    return {
        "trouble": None,
        "student_failure": "",
        "tickets_done": 0,
        "broken_files": [],
        "damaged": [],
        "note": "",
        **counts,
    }


@pytest.fixture
def run(stats: dict[str, Any]) -> Run:
    """A run that has asked for tickets 1 and 2."""
    schedule = SimpleNamespace(labels=10, holdout=2, train=5, rounds=4)
    session = SimpleNamespace(check=lambda: None)
    made: Any = Run(make_config(), None, session, schedule, Listener())  # type: ignore[arg-type]
    made.selector = SimpleNamespace(stats=SimpleNamespace(remote=lambda: stats))
    made.gauges = SimpleNamespace(show=lambda numbers: None)
    made._asked = [1, 2]
    return made


@pytest.mark.parametrize(
    ("asked", "damaged", "ends"),
    [
        ([1, 2], 1, False),  # it is asked again
        ([1, 2], 0, True),  # a restarted selector found it; the stream of tickets has gone past
        (None, 0, False),  # tickets are yet to be made, and from what is left
    ],
)
def test_damaged_files_are_told_of_once_and_end_a_run_that_would_wait_for_ever(
    run, stats, asked, damaged, ends
):
    run._asked = asked
    stats |= {"broken_files": [f"labels/ticket-{damaged:08d}.parquet cannot be read"], "damaged": [damaged]}
    for _ in range(2):
        with pytest.raises(TeacherDown, match="is damaged") if ends else nullcontext():
            run._check()
    assert run.display.said == stats["broken_files"]


def test_a_student_that_cannot_go_on_ends_the_run(run, stats):
    stats["student_failure"] = "round 1: the student's loss is nan"
    with pytest.raises(ConfigError, match="round 1"):
        run._check()


def test_what_the_cap_still_allows_is_shown(run, stats):
    usage = {"texts": 4, "prompt_tokens": 90, "answer_tokens": 4}
    run.config = make_config(budget={"cap": {"texts": 10, "tokens": 100}})
    run.lines = [{"round": 0, "loss": 0.5, "macro_f1": 0.612, "seconds": {"train": 30.0}}]
    stats |= {"labelled": 4, "trained": 2, "teacher_tokens": 94, "note": "training"}
    stats["usage"] = {"teacher": usage}
    run._check()
    line, rows = run.display.shown
    assert line == (
        "labelled 4 of 12, trained on 2 of 5; training; left: 6 texts, 6 tokens; about 1 min 30 s to go"
    )
    assert rows["round"] == "1 (2 of 4): training"
    assert rows["student"].endswith("last round: loss 0.500, macro-F1 61.2 %")
    assert rows["budget"] == "6 texts, 6 tokens left"


def test_the_reason_is_said_and_the_stream_has_ended_before_ray_is_shut_down(run, monkeypatch):
    """What is under way then has crashed drivers in Ray's own threads."""
    order: list[str] = []
    killed = threading.Event()
    monkeypatch.setattr(run_module.ray, "kill", lambda selector: killed.set())
    monkeypatch.setattr(run_module, "delete_snapshots", lambda store: order.append("files dropped"))
    monkeypatch.setattr(run.display, "say", order.append)

    def stream() -> None:
        assert killed.wait(60)
        time.sleep(0.05)  # for whoever would not wait for it to go on
        order.append("stream ended")

    run.teacher = Background("stream", stream)
    error = TeacherDown("no room\nto write labels")
    run.__exit__(TeacherDown, error, None)
    assert order == ["stopping: no room to write labels", "stream ended", "files dropped"]
