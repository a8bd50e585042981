"""A run's numbers come to where Prometheus looks."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from typing import ClassVar

import pytest

from llkd_ray.run import progress as gauges_module
from llkd_ray.run.progress import EVERY_S, Gauges


class Recorder:
    """Stands in for one of Ray's metrics."""

    made: ClassVar[dict[str, Recorder]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.values: list[float] = []
        assert tag_keys == ("run",)
        self.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append(value)
        assert tags == {"run": "mine"}

    inc = set


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Recorder, "made", {})
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(gauges_module, kind, Recorder)
    return Recorder.made


def test_what_grows_is_counted_from_where_the_driver_found_it(made, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(gauges_module.time, "monotonic", lambda: now[0])
    gauges = Gauges("mine")
    for labelled in (400.0, 400.0, 450.0, 520.0):
        gauges.show({"labelled_texts": labelled, "macro_f1": 0.5})
        now[0] += EVERY_S
    assert made["llkd_labelled_texts"].values == [400.0, 400.0, 450.0, 520.0]
    assert made["llkd_new_labelled_texts"].values == [50.0, 70.0]
    assert made["llkd_macro_f1"].values == [0.5] * 4
    assert "llkd_new_macro_f1" not in made


def test_nothing_is_published_more_often_than_it_is_read(made, monkeypatch):
    monkeypatch.setattr(gauges_module.time, "monotonic", lambda: 50.0)
    gauges = Gauges("mine")
    for value in (1.0, 2.0, 3.0):
        gauges.show({"round": value})
    assert made["llkd_round"].values == [1.0]


@pytest.mark.timeout(120)
def test_ray_exports_them(local_ray):
    import ray

    gauges = Gauges("exported-run")
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    until, labelled, lines, shown = time.monotonic() + 90, 0.0, {}, []
    while len(lines) < 3 and time.monotonic() < until:
        labelled += 10
        gauges.show({"labelled_texts": labelled, "macro_f1": 0.5})
        time.sleep(EVERY_S)
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as answer:
            shown = answer.read().decode().splitlines()
        lines = {line.split("{")[0]: line for line in shown if 'run="exported-run"' in line}
    assert set(lines) == {"ray_llkd_labelled_texts", "ray_llkd_new_labelled_texts_total", "ray_llkd_macro_f1"}
    assert lines["ray_llkd_macro_f1"].endswith(" 0.5")
