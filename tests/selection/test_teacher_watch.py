"""Tickets come back from actors that give up; whoever waits for nothing is told why."""

from __future__ import annotations

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
    def test_a_ticket_comes_back_once(self):
        watch = one_teacher(actors=2)
        watch.leased(3)
        for _ in range(2):
            watch.lost(3, "teacher", "actor-a", "gone", "call with 3")
        assert list(watch.returned) == [3]

    def test_nor_does_it_once_another_actor_has_it(self):
        watch = one_teacher(actors=2)
        watch.leased(3)
        watch.lost(3, "teacher", "actor-a", "gone", "call with 3")
        watch.leased(watch.returned.popleft())
        watch.lost(3, "teacher", "actor-a", "gone", "call with 3")
        assert list(watch.returned) == []

    def test_it_may_come_back_from_each_actor(self):
        watch = one_teacher(actors=3)
        for actor in ("actor-a", "actor-b"):
            watch.leased(3)
            watch.lost(3, "teacher", actor, "gone", f"call of {actor}")
            assert watch.returned.popleft() == 3

    def test_an_actor_gives_back_all_of_its_tickets(self):
        watch = one_teacher(actors=2)
        for ticket in (3, 4):
            watch.leased(ticket)
            watch.lost(ticket, "teacher", "actor-a", "gone", f"call with {ticket}")
        assert list(watch.returned) == [3, 4]
        assert not watch.all_lost()

    def test_one_that_an_actors_other_place_was_handed_comes_back_again(self):
        watch = one_teacher(actors=2)
        for call in ("first place", "second place"):
            watch.leased(3)
            watch.lost(3, "teacher", "actor-a", "gone", call)
            assert watch.returned.popleft() == 3
        watch.lost(3, "teacher", "actor-a", "gone", "first place")
        assert list(watch.returned) == []

    def test_who_hears_of_all_calls_at_once_has_it_come_back_once(self):
        watch = one_teacher(actors=3)
        for call in ("first place", "second place"):
            watch.leased(3)
            watch.lost(3, "teacher", "actor-a", "gone", call)
        assert list(watch.returned) == [3]

    def test_what_is_finished_does_not_come_back(self):
        watch = one_teacher(actors=2)
        watch.leased(3)
        watch.finished(3)
        watch.lost(3, "teacher", "actor-a", "gone", "call with 3")
        assert list(watch.returned) == []


class TestAllLost:
    def test_the_last_actor_decides(self):
        watch = one_teacher(actors=2)
        watch.lost(3, "teacher", "actor-a", "out of memory", "call with 3")
        watch.lost(4, "teacher", "actor-a", "out of memory", "call with 4")
        assert not watch.all_lost()
        assert watch.failure_reason() is None
        watch.lost(5, "teacher", "actor-b", "the server is gone", "call with 5")
        assert watch.all_lost()
        assert watch.failure_reason() == (
            "the teacher has given up, all 2 actor(s): out of memory; the server is gone"
        )

    def test_the_same_reason_is_told_once(self):
        watch = one_teacher(actors=2)
        for actor in ("actor-a", "actor-b"):
            watch.lost(3, "teacher", actor, "the server is gone", f"call of {actor}")
        assert watch.failure_reason() == "the teacher has given up, all 2 actor(s): the server is gone"

    def test_a_pool_that_may_grow_replaces_who_gives_up(self, clock):
        watch = one_teacher(actors=(1, 2), no_progress_timeout_s=60.0)
        watch.leased(3)
        watch.lost(3, "teacher", "actor-a", "out of memory", "call with 3")
        assert not watch.all_lost()
        assert watch.failure_reason() is None
        clock.now += 61
        failure_reason = watch.failure_reason()
        assert failure_reason is not None
        assert failure_reason.endswith("or its node is lost; 1 gave up: out of memory")
        watch.lost(4, "teacher", "actor-b", "out of memory", "call with 4")
        assert watch.failure_reason() == "the teacher has given up, all 2 actor(s): out of memory"

    def test_either_teacher_of_a_cascade_is_needed(self):
        watch = cascade(small_actors=2, large_actors=1)
        watch.lost(3, "small", "actor-a", "gone", "call with 3")
        assert not watch.all_lost()
        watch.lost(3, "large", "actor-b", "no credit is left", "call with 3")
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
        failure_reason = watch.failure_reason()
        assert failure_reason is not None
        assert (
            "no progress for 61 s with 2 ticket(s) under way (teacher.no_progress_timeout_s)"
            in failure_reason
        )
        assert not watch.all_lost(), "the teachers may still be there"

    @pytest.mark.parametrize(
        "sign",
        [
            lambda watch: watch.leased(5),
            lambda watch: watch.finished(4),
            lambda watch: watch.lost(4, "teacher", "actor-a", "gone", "call with 4"),
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
        watch = one_teacher(no_progress_timeout_s=60.0)
        clock.now += 1000
        assert watch.failure_reason() is None, (
            "no ticket is out yet: an engine may start, a student may train"
        )
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

    def test_a_ticket_that_waits_for_another_actor_is_waited_for(self, clock):
        """Nobody takes it: a run that needs it would wait for ever."""
        watch = one_teacher(actors=2, no_progress_timeout_s=60.0)
        watch.leased(3)
        watch.lost(3, "teacher", "actor-a", "gone", "call with 3")
        clock.now += 61
        assert watch.failure_reason() is not None
