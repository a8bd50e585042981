"""How fast labels come in, with times that the tests give."""

from __future__ import annotations

from llkd_ray.run.progress import POINTS, WINDOW_S, ThroughputMeter


def test_a_round_keeps_when_labels_came():
    pace = ThroughputMeter()
    pace.note(99.0, 40, 0)
    pace.begin_round(100.0)
    for now, labelled in ((101.0, 50), (102.0, 70), (103.0, 70), (104.0, 70), (105.0, 70), (106.0, 90)):
        pace.note(now, labelled, 0)
    assert pace.points() == [[0.0, 40], [1.0, 50], [2.0, 70], [5.0, 70], [6.0, 90]]


def test_a_long_round_keeps_no_more_and_never_loses_its_end():
    pace = ThroughputMeter()
    pace.begin_round(0.0)
    for second in range(1, 10_001):
        pace.note(float(second), 3 * second, 0)
        assert len(pace.points()) <= POINTS + 1
    points = pace.points()
    assert points[-1] == [10_000.0, 30_000]
    assert len(points) > POINTS // 2
    assert all(labelled == 3 * seconds for seconds, labelled in points)


def test_a_new_round_begins_anew():
    pace = ThroughputMeter()
    pace.begin_round(0.0)
    pace.note(5.0, 10, 0)
    pace.begin_round(8.0)
    pace.note(9.0, 12, 0)
    assert pace.points() == [[0.0, 10], [1.0, 12]]
    assert pace.in_round(10.0) == 2.0


def test_rates_are_those_of_the_last_while():
    pace = ThroughputMeter()
    assert pace.rates() == (0.0, 0.0)
    pace.note(0.0, 0, 0)
    assert pace.rates() == (0.0, 0.0)
    pace.note(10.0, 100, 1000)
    assert pace.rates() == (10.0, 100.0)
    for second in range(11, 11 + int(WINDOW_S) + 5):
        pace.note(float(second), 100, 1000)
    assert pace.rates() == (0.0, 0.0)


def test_before_any_round_there_is_nothing():
    pace = ThroughputMeter()
    pace.note(1.0, 5, 5)
    assert pace.points() == []
    assert pace.in_round(2.0) == 0.0
