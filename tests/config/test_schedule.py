"""Tickets and rounds hold to the budgets, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toys import make_config

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schedule import Schedule


def plan(
    n_pool: int, n_test: int = 0, *, ticket_size: int = 16, holdout: int = 20, on_test: bool = True, **budget
) -> Schedule:
    config = make_config(
        teacher={"ticket_size": ticket_size},
        evaluation={"holdout": holdout, "teacher_on_test": on_test},
        budget=budget,
    )
    return Schedule.plan(config, n_pool, n_test)


@st.composite
def schedules(draw) -> tuple[Schedule, int, int]:
    n_pool, n_test = draw(st.integers(1, 3000)), draw(st.integers(0, 300))
    try:
        schedule = plan(
            n_pool,
            n_test,
            ticket_size=draw(st.integers(1, 200)),
            holdout=draw(st.integers(0, 300)),
            on_test=draw(st.booleans()),
            rounds=draw(st.integers(1, 12)),
            labels=draw(st.none() | st.integers(1, 4000)),
            first_labels=draw(st.sampled_from([0.0, 0.1, 1 / 3, 0.7, 1.0]) | st.floats(0, 1)),
            train=draw(st.floats(0.01, 1)),
            growth=draw(st.sampled_from([1.0, 1.3, 2.0, 10.0])),
        )
    except ConfigError:
        assume(False)
    return schedule, n_pool, n_test


@settings(max_examples=200)
@given(schedules())
def test_tickets_make_up_the_budgets(drawn):
    schedule, n_pool, n_test = drawn
    kinds = (
        (schedule.holdout_tickets, schedule.holdout),
        (schedule.pool_tickets, schedule.labels),
        (schedule.test_tickets, schedule.test),
    )
    numbers = [ticket for tickets, _ in kinds for ticket in tickets]
    assert numbers == list(range(schedule.n_tickets)), "every ticket is of one kind, hold-out first"
    for tickets, rows in kinds:
        sizes = [schedule.ticket_rows(ticket) for ticket in tickets]
        assert sum(sizes) == rows
        assert all(size == schedule.ticket_size for size in sizes[:-1])
        assert all(1 <= size <= schedule.ticket_size for size in sizes)
    assert schedule.labels + schedule.holdout <= n_pool
    assert schedule.test in (0, n_test)
    assert schedule.rounds <= schedule.train <= schedule.labels


@settings(max_examples=200)
@given(schedules())
def test_rounds_see_ever_more_tickets_and_the_last_sees_all(drawn):
    schedule, _, _ = drawn
    before = [schedule.tickets_before(k) for k in range(schedule.rounds)]
    for ticket in schedule.pool_tickets:
        k = schedule.round_of(ticket)
        assert ticket < before[k]
        assert k == 0 or ticket >= before[k - 1], "the first round that sees it"
    assert before == sorted(before)
    assert before[0] > schedule.pool_tickets.start, "the first round has something to choose from"
    assert before[-1] == schedule.pool_tickets.stop
    first_share = (before[0] - schedule.pool_tickets.start) / len(schedule.pool_tickets)
    assert first_share >= max(schedule.first_labels, 1 / schedule.rounds) - 1e-6


@settings(max_examples=100)
@given(schedules())
def test_train_target_grows_to_the_budget(drawn):
    schedule, _, _ = drawn
    targets = [schedule.train_target(k) for k in range(schedule.rounds)]
    assert targets[-1] == schedule.train
    new = np.diff([0, *targets])
    assert new.min() >= 1
    assert np.diff(new).min(initial=0) >= -1, "no round takes less than the one before, but for rounding"
    if schedule.growth == 1:
        assert np.ptp(new) <= 1


class TestBudgets:
    def test_by_hand(self):
        schedule = plan(1000, 50, ticket_size=100, holdout=30, rounds=4, labels=430, train=200)
        assert (schedule.holdout, schedule.labels, schedule.test, schedule.train) == (30, 400, 50, 200)
        assert list(schedule.holdout_tickets) == [0]
        assert list(schedule.pool_tickets) == [1, 2, 3, 4]
        assert list(schedule.test_tickets) == [5]
        assert [schedule.ticket_rows(t) for t in range(6)] == [30, 100, 100, 100, 100, 50]
        assert [schedule.tickets_before(k) for k in range(4)] == [2, 3, 4, 5]
        assert [schedule.train_target(k) for k in range(4)] == [13, 40, 93, 200]

    @pytest.mark.parametrize(
        ("train", "growth", "targets"), [(150, 2.0, [10, 30, 70, 150]), (5, 10.0, [1, 2, 3, 5])]
    )
    def test_growth_multiplies_the_new_texts_and_leaves_every_round_one(self, train, growth, targets):
        schedule = plan(1000, rounds=4, train=train, growth=growth, first_labels=1.0)
        assert [schedule.train_target(k) for k in range(4)] == targets
        assert {schedule.tickets_before(k) for k in range(4)} == {schedule.pool_tickets.stop}, "all at once"

    def test_what_is_more_than_there_is_is_cut(self):
        assert plan(100, holdout=200, train=0.5).holdout == 10
        assert plan(100, holdout=200, train=0.5, labels=50).holdout == 5
        assert plan(500, 80, on_test=False).n_tickets == plan(500).n_tickets
        schedule = plan(300, labels=10_000)
        assert schedule.labels + schedule.holdout == 300
        assert plan(1000, labels=200, holdout=0, train=0.9).train == 200

    @pytest.mark.parametrize(
        ("n_pool", "budget", "field"),
        [(40, {"train": 0.1}, "train"), (1000, {"labels": 3, "train": 0.5}, "labels")],
    )
    def test_too_little_for_the_rounds_is_refused(self, n_pool, budget, field):
        with pytest.raises(ConfigError, match=rf"^budget\.{field}: "):
            plan(n_pool, rounds=5, **budget)
