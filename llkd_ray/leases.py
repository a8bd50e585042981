"""Which rows each ticket stands for: fixed ones, what an acquisition policy chose, what a review looks at.

What is chosen is in a file before anybody acts on it, so that a selector that comes later leases the same.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from llkd_ray import schemas
from llkd_ray.acquisition import ACQUISITION
from llkd_ray.config import Config
from llkd_ray.intake import draw_holdout
from llkd_ray.schedule import Schedule
from llkd_ray.signals import Ints
from llkd_ray.store import LEASES_DIR, Examples, RunStore
from llkd_ray.table import ScoreTable

# First word of the seed of the generator that acquisition draws from; the selector's others differ.
_ACQUIRE_SEED = 2
_REVIEW = "review-"


class Leases:
    """Rows by ticket, noted in the score table; planned a round at a time."""

    def __init__(
        self, config: Config, store: RunStore, examples: Examples, schedule: Schedule, table: ScoreTable
    ) -> None:
        self.config, self.store, self.schedule, self.table = config, store, schedule, table
        self.policy = ACQUISITION[config.acquisition.policy]
        self.rows: dict[int, Ints] = {}
        """int64[M] of each ticket that is planned."""
        self._planned = 0
        """All rounds below this one are planned."""
        self._note_fixed(draw_holdout(config, examples, schedule), examples.test_rows)
        self._restore()

    def of(self, ticket: int) -> Ints:
        """int64[M]: the rows of a ticket, planned now if they are not."""
        if ticket not in self.rows:
            if ticket in self.schedule.review_tickets:
                self._plan_review(ticket)
            else:
                # In order, so that what a round reads does not depend on which ticket asks first.
                for k in range(self._planned, self.schedule.round_of(ticket) + 1):
                    self._plan_round(k)
                    self._planned = k + 1
        return self.rows[ticket]

    def empty_reviews(self) -> list[int]:
        """Reviews that were planned and found nothing to look at; they have no label file."""
        return [t for t in self.schedule.review_tickets if t in self.rows and not self.rows[t].size]

    def _plan_round(self, round_number: int) -> None:
        """Choose the rows of all tickets that a round is the first to choose from, if that is not done."""
        below = self.schedule.tickets_before(round_number)
        start = self.schedule.tickets_before(round_number - 1) if round_number else 0
        tickets = range(max(start, self.schedule.pool_tickets.start), below)
        if not tickets or tickets[0] in self.rows:
            return
        sizes = [self.schedule.ticket_rows(ticket) for ticket in tickets]
        rng = np.random.default_rng([self.config.run.seed, _ACQUIRE_SEED, round_number])
        row_M = self.policy.choose(
            self.table.unread_chunks(),
            sum(sizes),
            rng,
            seed=self.config.run.seed,
            explore=self.config.acquisition.explore,
        )
        ticket_M = np.repeat(np.array(tickets, dtype=np.int32), sizes)
        self._write(f"{round_number:04d}", ticket_M, row_M)
        self._note(ticket_M, row_M)

    def _plan_review(self, ticket: int) -> None:
        """Choose the labelled rows that a review looks at again."""
        cascade = self.config.teacher.cascade
        assert cascade is not None
        assert cascade.contradicted_above is not None
        row_M = self.table.contradicted(cascade.contradicted_above, cascade.review)
        ticket_M = np.full(row_M.size, ticket, dtype=np.int32)
        self._write(f"{_REVIEW}{self.schedule.round_of(ticket):04d}", ticket_M, row_M)
        self.rows[ticket] = row_M

    def _write(self, name: str, ticket_M: Ints, row_M: Ints) -> None:
        table = pa.Table.from_arrays([pa.array(ticket_M), pa.array(row_M)], schema=schemas.LEASES)
        self.store.write_table(f"{LEASES_DIR}/{name}.parquet", table)

    def _note(self, ticket_M: Ints, row_M: Ints) -> None:
        """Rows by ticket; ``ticket_M`` is ascending."""
        tickets, starts = np.unique(ticket_M, return_index=True)
        for ticket, rows in zip(tickets.tolist(), np.split(row_M, starts[1:]), strict=bool(tickets.size)):
            self.rows[ticket] = rows
            self.table.lease(ticket, rows)

    def _note_fixed(self, holdout: Ints, test: Ints) -> None:
        """Hold-out and test rows do not depend on anything that happens in the run."""
        self.table.hold_out(holdout)
        for tickets, rows in (
            (self.schedule.holdout_tickets, holdout),
            (self.schedule.test_tickets, test[: self.schedule.test]),
        ):
            sizes = [self.schedule.ticket_rows(ticket) for ticket in tickets]
            self._note(np.repeat(np.array(tickets, dtype=np.int32), sizes), rows)

    def _restore(self) -> None:
        for name in self.store.names(LEASES_DIR, ".parquet"):
            leases = self.store.read_table(f"{LEASES_DIR}/{name}")
            ticket_M, row_M = leases["ticket"].to_numpy(), leases["row"].to_numpy()
            if name.startswith(_REVIEW):
                round_number = int(name.removeprefix(_REVIEW).partition(".")[0])
                self.rows[self.schedule.review_tickets[round_number - 1]] = row_M
            else:
                self._note(ticket_M, row_M)
