"""Splits a run's budget into tickets (batches of texts for the teacher) and rounds (training batches)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schema import Config

MAX_UNLIMITED_POOL = 50_000
"""Texts that a teacher labels without ``budget.labels``; more must be asked for."""


@dataclass(frozen=True)
class Schedule:
    """The plan of a run, determined by the config and the number of texts.

    Tickets are numbered in this order: hold-out, pool, test set, reviews. If a cascade's large teacher
    reviews labels, every round after the first has one review ticket.
    """

    ticket_size: int
    """Texts in a ticket."""
    rounds: int
    holdout: int
    """Pool texts that the teacher labels but the student is never trained on."""
    labels: int
    """Pool texts that the teacher labels, without the hold-out."""
    test: int
    """Test texts that the teacher labels."""
    train: int
    """Total number of texts that the student trains on."""
    first_labels: float
    growth: float
    """Ratio of a round's new texts to those of the previous round."""
    reviews: bool = False

    @classmethod
    def plan(cls, config: Config, n_pool: int, n_test: int) -> Schedule:
        """Compare the budgets with the number of texts; raises :class:`ConfigError` if there are too few."""
        budget, evaluation = config.budget, config.evaluation
        if budget.labels is None and n_pool > MAX_UNLIMITED_POOL and config.teacher.kind != "recorded":
            raise ConfigError(
                f"budget.labels: it is not set, and the teacher would label all {n_pool:,} texts; set how "
                f"many it may label, such as 20000, or {n_pool} for all"
            )
        labels = min(budget.labels or n_pool, n_pool)
        holdout = min(evaluation.holdout, labels // 10)
        train = budget.train if isinstance(budget.train, int) else round(budget.train * n_pool)
        if train < budget.rounds:
            raise ConfigError(
                f"budget.train: {budget.train} of a pool of {n_pool} texts makes {train} texts for "
                f"{budget.rounds} rounds; raise budget.train or lower budget.rounds"
            )
        train = min(train, labels - holdout)
        if train < budget.rounds:
            raise ConfigError(
                f"budget.labels: {labels} labelled texts of a pool of {n_pool}, {holdout} of them held out, "
                f"leave {train} for {budget.rounds} rounds; raise budget.labels or lower budget.rounds"
            )
        return cls(
            ticket_size=config.teacher.ticket_size,
            rounds=budget.rounds,
            holdout=holdout,
            labels=labels - holdout,
            test=n_test if evaluation.teacher_on_test else 0,
            train=train,
            first_labels=budget.first_labels,
            growth=budget.growth,
            reviews=config.teacher.reviews,
        )

    @property
    def holdout_tickets(self) -> range:
        return range(ceil(self.holdout / self.ticket_size))

    @property
    def pool_tickets(self) -> range:
        start = self.holdout_tickets.stop
        return range(start, start + ceil(self.labels / self.ticket_size))

    @property
    def test_tickets(self) -> range:
        start = self.pool_tickets.stop
        return range(start, start + ceil(self.test / self.ticket_size))

    @property
    def review_tickets(self) -> range:
        start = self.test_tickets.stop
        return range(start, start + (self.rounds - 1 if self.reviews else 0))

    @property
    def n_tickets(self) -> int:
        return self.review_tickets.stop

    def fixed_tickets(self) -> Sequence[int]:
        """Tickets of hold-out and test set, whose rows do not depend on acquisition."""
        return [*self.holdout_tickets, *self.test_tickets]

    def is_fixed(self, ticket: int) -> bool:
        return ticket in self.holdout_tickets or ticket in self.test_tickets

    def needed_for(self, round_number: int) -> Iterator[int]:
        """The tickets that must be labelled before a round can select its batch."""
        yield from range(self.tickets_before(round_number))
        yield from self.review_tickets[:round_number]

    def in_order(self) -> Iterator[int]:
        """All tickets in the order of labelling: first those that rounds wait for, the test set last."""
        yield from self.holdout_tickets
        done = self.pool_tickets.start
        for k in range(self.rounds):
            yield from range(done, self.tickets_before(k))
            yield from self.review_tickets[k - 1 : k] if k else ()
            done = self.tickets_before(k)
        yield from self.test_tickets

    def tickets_before(self, round_number: int) -> int:
        """All tickets below this number are labelled before the round's batch is selected.

        Hold-out and an equal share of the pool's tickets (or ``first_labels`` of them if that is more) come
        before round 0; the last round may select from all.
        """
        pool = self.pool_tickets
        even = 1 / self.rounds
        first = max(self.first_labels, even)
        later = (1 - first) * (round_number / (self.rounds - 1)) if self.rounds > 1 else 1 - first
        # The small constant prevents a rounding error from adding one ticket.
        return pool.start + min(len(pool), ceil(len(pool) * (first + later) - 1e-6))

    def round_of(self, ticket: int) -> int:
        """The first round that may select from the rows of a pool ticket, or use a review ticket."""
        if ticket in self.review_tickets:
            return ticket - self.review_tickets.start + 1
        return bisect_right(range(self.rounds), ticket, key=self.tickets_before)

    def ticket_rows(self, ticket: int) -> int:
        """Texts in a ticket other than a review: ``ticket_size``, or fewer for the last of its kind."""
        for tickets, rows in (
            (self.holdout_tickets, self.holdout),
            (self.pool_tickets, self.labels),
            (self.test_tickets, self.test),
        ):
            if ticket in tickets:
                return min(self.ticket_size, rows - (ticket - tickets.start) * self.ticket_size)
        raise AssertionError(f"ticket {ticket} of {self.n_tickets}")

    def train_target(self, round_number: int) -> int:
        """Total number of training texts after the round, if every round fills its batch."""
        done, left = round_number + 1, self.rounds - round_number - 1
        if self.growth == 1:
            share = done / self.rounds
        else:  # a geometric series
            share = (self.growth**done - 1) / (self.growth**self.rounds - 1)
        # Every round gets at least one text. The small constant prevents a rounding error from removing one.
        return min(max(int(self.train * share + 1e-6), done), self.train - left)
