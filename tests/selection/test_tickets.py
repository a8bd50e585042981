"""Tickets come back from actors that give up; whoever waits for nothing is told why."""

from __future__ import annotations

import re

import pytest
from toys import make_config

from llkd_ray.selection import tickets
from llkd_ray.selection.tickets import TeacherWatch


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still unless it is moved."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(tickets, "time", clock)
    return clock


def one_teacher(actors: int | tuple[int, int] = 1, **settings) -> TeacherWatch:
    return TeacherWatch(make_config(teacher={"actors": actors, **settings}))


def cascade(small_actors: int, large_actors: int, **of_large) -> TeacherWatch:
    member = {"kind": "recorded", "recorded": {"uri": "answers.parquet"}}
    small = member | {"actors": small_actors}
    large = member | {"actors": large_actors} | of_large
    return TeacherWatch(make_config(teacher={"kind": "cascade", "cascade": {"small": small, "large": large}}))


class TestGivenBack:
    """Ticket 3 is leased and given back; a call may come again."""

    @pytest.mark.parametrize(
        ("calls", "comes_back"),
        [
            (["a one", "a one"], [True, False]),  # a repeat, though another actor has it by now
            (["a one", "b one"], [True, True]),
            (["a one", "a two", "a one"], [True, True, False]),  # two places of an actor were handed it
        ],
    )
    def test_once_for_each_call(self, calls, comes_back):
        watch = one_teacher(actors=3)
        for call, comes in zip(calls, comes_back, strict=True):
            watch.leased(3)
            watch.lost(3, "teacher", call[0], "gone", call)
            assert list(watch.returned) == [3] * comes
            watch.returned.clear()

    def test_once_for_who_hears_of_all_calls_at_once(self):
        watch = one_teacher(actors=3)
        for call in ("one", "one", "two"):
            watch.leased(3)
            watch.lost(3, "teacher", "a", "gone", call)
        assert list(watch.returned) == [3]

    def test_all_of_an_actors_tickets_but_none_that_is_finished(self):
        watch = one_teacher(actors=2)
        watch.leased(2)
        watch.finished(2)
        watch.lost(2, "teacher", "a", "gone", "with 2")
        for ticket in (3, 4):
            watch.leased(ticket)
            watch.lost(ticket, "teacher", "a", "gone", f"with {ticket}")
        assert list(watch.returned) == [3, 4]
        assert not watch.all_lost()


class TestAllLost:
    @pytest.mark.parametrize("reason", ["out of memory", "the server is gone"])
    def test_the_last_actor_decides_and_each_reason_is_told_once(self, reason):
        watch = one_teacher(actors=2)
        for ticket in (3, 4):
            watch.lost(ticket, "teacher", "a", "out of memory", f"with {ticket}")
        assert not watch.all_lost()
        assert watch.failure_reason() is None
        watch.lost(5, "teacher", "b", reason, "with 5")
        assert watch.all_lost()
        reasons = "; ".join(dict.fromkeys(["out of memory", reason]))
        assert watch.failure_reason() == f"the teacher has given up, all 2 actor(s): {reasons}"

    def test_a_pool_that_may_grow_replaces_who_gives_up(self, clock):
        watch = one_teacher(actors=(1, 2), no_progress_timeout_s=60.0)
        watch.leased(3)
        watch.lost(3, "teacher", "a", "out of memory", "with 3")
        assert not watch.all_lost()
        assert watch.failure_reason() is None
        clock.now += 61
        assert str(watch.failure_reason()).endswith("or its node is lost; 1 gave up: out of memory")
        watch.lost(4, "teacher", "b", "out of memory", "with 4")
        assert watch.failure_reason() == "the teacher has given up, all 2 actor(s): out of memory"

    def test_either_teacher_of_a_cascade_is_needed(self):
        watch = cascade(small_actors=2, large_actors=1)
        watch.lost(3, "small", "a", "gone", "with 3")
        assert not watch.all_lost()
        watch.lost(3, "large", "b", "no credit is left", "with 3")
        assert watch.all_lost()
        assert watch.failure_reason() == "the large teacher has given up, all 1 actor(s): no credit is left"


class TestStall:
    def test_no_progress_for_too_long(self, clock):
        watch = one_teacher(no_progress_timeout_s=60.0)
        watch.leased(3)
        watch.leased(4)
        clock.now += 59
        assert watch.failure_reason() is None
        clock.now += 2
        stalled = r"no progress for 61 s with 2 ticket\(s\) under way \(teacher\.no_progress_timeout_s\)"
        assert re.search(stalled, str(watch.failure_reason()))
        assert not watch.all_lost(), "the teachers may still be there"

    @pytest.mark.parametrize(
        "sign",
        [
            lambda watch: watch.leased(5),
            lambda watch: watch.finished(4),
            lambda watch: [watch.lost(t, "teacher", "a", "gone", f"with {t}") for t in (3, 4)],
        ],
    )
    def test_whatever_moves_is_progress(self, clock, sign):
        watch = one_teacher(actors=2, no_progress_timeout_s=60.0)
        watch.leased(3)
        watch.leased(4)
        clock.now += 50
        sign(watch)
        clock.now += 50
        assert watch.failure_reason() is None
        clock.now += 11
        assert watch.failure_reason() is not None

    def test_who_has_nothing_to_do_may_be_quiet(self, clock):
        """An engine may start, a student may train."""
        watch = one_teacher(no_progress_timeout_s=60.0)
        clock.now += 1000
        assert watch.failure_reason() is None, "no ticket is out yet"
        watch.leased(3)
        watch.finished(3)
        clock.now += 1000
        assert watch.failure_reason() is None

    def test_the_more_patient_teacher_of_a_cascade_decides(self, clock):
        watch = cascade(1, 1, no_progress_timeout_s=10_000.0)
        watch.leased(3)
        clock.now += 9_000
        assert watch.failure_reason() is None
        clock.now += 2_000
        assert watch.failure_reason() is not None
