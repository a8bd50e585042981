"""Where a run stands, in words and in numbers, how fast labels come in, and what Prometheus is told."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from llkd_ray.run import progress as module
from llkd_ray.run.progress import (
    EVERY_S,
    POINTS,
    WINDOW_S,
    Gauges,
    RunStatus,
    ThroughputMeter,
    budget_left,
    seconds_left,
)

START = RunStatus(
    labelled=0, to_label=8000, trained=0, to_train=400, labels_a_second=0.0, tokens=0, tokens_a_second=0.0,
    round_number=0, rounds=4, note="", last={}, seconds_left=None, budget_left="",
)  # fmt: skip
LATER = replace(
    START, labelled=2000, trained=100, labels_a_second=512.3, tokens=81_049, tokens_a_second=20_700.0,
    round_number=1, note="round 1: training, step 20 of 60", seconds_left=193.0, budget_left="1,200 texts",
    last={"loss": 0.5312, "macro_f1": 0.606, "accuracy": None, "teacher_agreement": 0.645},
)  # fmt: skip


def test_a_line_says_what_is_known():
    assert START.line() == "labelled 0 of 8000, trained on 0 of 400; starting"
    assert LATER.line() == (
        "labelled 2000 of 8000, 512/s, trained on 100 of 400; round 1: training, step 20 of 60; "
        "left: 1,200 texts; about 3 min 10 s to go"
    )
    assert LATER.numbers()["macro_f1"] == 0.606
    assert "accuracy" not in LATER.numbers()
    assert "seconds_left" not in START.numbers()


def test_rows_say_the_same_to_a_terminal():
    rows = dict(LATER.rows())
    assert rows["round"] == "1 (2 of 4): training, step 20 of 60"
    assert "2,000 of 8,000 labelled, 512 a second; 81,049 tokens, 20,700 a second" in rows["teacher"]
    assert rows["teacher"].startswith("━━━━━━╌")
    assert "last round: loss 0.531, macro-F1 60.6 %, agreement 64.5 %" in rows["student"]
    assert rows["budget"] == "1,200 texts left"
    assert rows["to go"] == "about 3 min 10 s"
    assert "budget" not in dict(START.rows())
    assert dict(START.rows())["to go"] == "not known before the end of a round"


def test_time_left_is_that_of_the_last_round_for_each_to_come():
    assert seconds_left([], 4, 10.0) is None
    lines = [{"seconds": {"train": 90.0}}, {"seconds": {"train": 20.0, "idle": 10.0}}]
    assert seconds_left(lines, 4, 5.0) == 55.0
    assert seconds_left(lines, 2, 5.0) == 0.0


def test_budget_left_is_never_less_than_nothing():
    cap = {"texts": 100, "tokens": None, "cost": 2.0}
    assert budget_left(cap, {"texts": 120.0, "tokens": 5.0, "cost": 0.5}, "EUR") == "0 texts, 1.50 EUR"


# --- how fast; times are the tests' own


def test_a_round_keeps_when_labels_came():
    meter = ThroughputMeter()
    meter.note(99.0, 40, 0)
    meter.begin_round(100.0)
    for now, labelled in ((101.0, 50), (102.0, 70), (103.0, 70), (104.0, 70), (105.0, 70), (106.0, 90)):
        meter.note(now, labelled, 0)
    assert meter.points() == [[0.0, 40], [1.0, 50], [2.0, 70], [5.0, 70], [6.0, 90]]


def test_a_long_round_keeps_no_more_and_never_loses_its_end():
    meter = ThroughputMeter()
    meter.begin_round(0.0)
    for second in range(1, 10_001):
        meter.note(float(second), 3 * second, 0)
        assert len(meter.points()) <= POINTS + 1
    points = meter.points()
    assert points[-1] == [10_000.0, 30_000]
    assert len(points) > POINTS // 2
    assert all(labelled == 3 * seconds for seconds, labelled in points)


def test_rates_are_those_of_the_last_while():
    meter = ThroughputMeter()
    assert meter.rates() == (0.0, 0.0)
    meter.note(0.0, 0, 0)
    assert meter.rates() == (0.0, 0.0)
    meter.note(10.0, 100, 1000)
    assert meter.rates() == (10.0, 100.0)
    for second in range(11, 11 + int(WINDOW_S) + 5):
        meter.note(float(second), 100, 1000)
    assert meter.rates() == (0.0, 0.0)


# --- metrics


class Recorder:
    """Stands in for one of Ray's metrics."""

    made: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.values = self.made[name] = []
        assert tag_keys == ("run",)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append(value)
        assert tags == {"run": "mine"}

    inc = set


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Recorder, "made", {})
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(module, kind, Recorder)
    return Recorder.made


def test_what_grows_is_counted_from_where_the_driver_found_it(made, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    gauges = Gauges("mine")
    for labelled in (400.0, 400.0, 450.0, 520.0):
        gauges.show({"labelled_texts": labelled, "macro_f1": 0.5})
        gauges.show({"labelled_texts": 999.0})  # more often than anybody reads it
        now[0] += EVERY_S
    assert made == {
        "llkd_labelled_texts": [400.0, 400.0, 450.0, 520.0],
        "llkd_new_labelled_texts": [50.0, 70.0],
        "llkd_macro_f1": [0.5] * 4,
    }


@pytest.mark.timeout(120)
def test_ray_exports_them(local_ray):
    import ray

    gauges = Gauges("exported-run")
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    labelled, lines, shown = 0.0, {}, []
    while len(lines) < 3:  # pytest's limit ends it
        labelled += 10
        gauges.show({"labelled_texts": labelled, "macro_f1": 0.5})
        time.sleep(EVERY_S)
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10) as answer:
            shown = answer.read().decode().splitlines()
        lines = {line.split("{")[0]: line for line in shown if 'run="exported-run"' in line}
    assert set(lines) == {"ray_llkd_labelled_texts", "ray_llkd_new_labelled_texts_total", "ray_llkd_macro_f1"}
    assert lines["ray_llkd_macro_f1"].endswith(" 0.5")
