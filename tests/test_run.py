"""What a driver hears of its run's parts while it waits; the parts themselves run in tests/cluster/."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from toys import make_config

from llkd_ray import run as run_module
from llkd_ray.answers import TeacherDown
from llkd_ray.run import Run


class Listener:
    """A display."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def update(self, line: str) -> None:
        pass


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the selector says."""
    monkeypatch.setattr(run_module.ray, "get", lambda answer: answer)
    return {"trouble": None, "put_aside": [], "damaged": [], "labelled": 0, "trained": 0, "note": ""}


@pytest.fixture
def run(stats: dict[str, Any]) -> Run:
    """A run that has asked for tickets 1 and 2."""
    schedule = SimpleNamespace(labels=10, holdout=2, train=5)
    session = SimpleNamespace(check=lambda: None)
    made: Any = Run(make_config(), None, session, schedule, Listener())  # type: ignore[arg-type]
    made.selector = SimpleNamespace(stats=SimpleNamespace(remote=lambda: stats))
    made._asked = [1, 2]
    return made


def test_damaged_files_are_told_of_once_and_asked_again(run, stats):
    stats |= {"put_aside": ["labels/ticket-00000001.parquet cannot be read"], "damaged": [1]}
    run._check()
    run._check()
    assert run.display.said == ["labels/ticket-00000001.parquet cannot be read"]


def test_damage_in_mid_run_ends_it_rather_than_to_wait_for_ever(run, stats):
    """A restarted selector found it; the stream of tickets has gone past."""
    stats |= {"put_aside": ["labels/ticket-00000000.parquet cannot be read"], "damaged": [0]}
    with pytest.raises(TeacherDown, match="is damaged"):
        run._check()
    assert run.display.said == ["labels/ticket-00000000.parquet cannot be read"]


def test_before_tickets_are_known_damage_is_what_they_are_made_from(run, stats):
    run._asked = None
    stats |= {"put_aside": ["labels/ticket-00000000.parquet cannot be read"], "damaged": [0]}
    run._check()
