"""Tickets: the rows of each, the returned labels, and the teachers working on them.

A choice of rows is written to a file before it is used, so that a restarted selector leases the same rows.
No row counts as labelled before the calibrator is fitted, so that a label never changes after it was used.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from llkd_ray.config.base import ConfigError
from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.metrics.calibration import MIN_GOLD, Calibrator
from llkd_ray.metrics.uncertainty import Ints, confidence
from llkd_ray.selection.acquisition import AcquisitionPolicy
from llkd_ray.selection.table import ScoreTable
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import CALIBRATION, LEASES_DIR, RunStore
from llkd_ray.storage.tables import Examples, read_calibrator
from llkd_ray.teacher.base import Usage, add_usages
from llkd_ray.teacher.labels import TicketLabels

# First word of the seed of acquisition's generator, different from the selector's others.
_ACQUIRE_SEED = 2
_REVIEW = "review-"


class Leases:
    """Rows by ticket, stored in the score table; planned a round at a time."""

    def __init__(
        self,
        config: Config,
        policy: AcquisitionPolicy,
        store: RunStore,
        examples: Examples,
        schedule: Schedule,
        table: ScoreTable,
    ) -> None:
        self.config, self.policy = config, policy
        self.store, self.schedule, self.table = store, schedule, table
        self.rows: dict[int, Ints] = {}
        """int64[M] by planned ticket."""
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
                # In order, so that a round's rows do not depend on the order of leases.
                for k in range(self._planned, self.schedule.round_of(ticket) + 1):
                    self._plan_round(k)
                    self._planned = k + 1
        return self.rows[ticket]

    def empty_reviews(self) -> list[int]:
        """Planned reviews without rows; they have no label file."""
        return [t for t in self.schedule.review_tickets if t in self.rows and not self.rows[t].size]

    def _plan_round(self, round_number: int) -> None:
        """Choose the rows of the tickets that are new in a round, unless that is done."""
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
        """Choose the labelled rows of a review."""
        cascade = self.config.teacher.cascade
        assert cascade is not None
        assert cascade.review_margin is not None
        row_M = self.table.contradicted(cascade.review_margin, cascade.review)
        ticket_M = np.full(row_M.size, ticket, dtype=np.int32)
        self._write(f"{_REVIEW}{self.schedule.round_of(ticket):04d}", ticket_M, row_M)
        self.rows[ticket] = row_M

    def _write(self, name: str, ticket_M: Ints, row_M: Ints) -> None:
        table = pa.Table.from_arrays([pa.array(ticket_M), pa.array(row_M)], schema=tables.LEASES)
        self.store.write_table(f"{LEASES_DIR}/{name}.parquet", table)

    def _note(self, ticket_M: Ints, row_M: Ints) -> None:
        """Rows by ticket; ``ticket_M`` is ascending."""
        tickets, starts = np.unique(ticket_M, return_index=True)
        for ticket, rows in zip(tickets.tolist(), np.split(row_M, starts[1:]), strict=bool(tickets.size)):
            self.rows[ticket] = rows
            self.table.lease(ticket, rows)

    def _note_fixed(self, holdout: Ints, test: Ints) -> None:
        """Assign the hold-out and test rows, which are fixed before the run."""
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


# First word of the seed of the hold-out's generator, different from the selector's others.
_HOLDOUT_SEED = 1


class LabelIngest:
    """Ingests labels: calibrates them, stores them in the score table and adds up usage."""

    def __init__(
        self, config: Config, store: RunStore, examples: Examples, schedule: Schedule, table: ScoreTable
    ) -> None:
        self.config = config.teacher.confidence
        self.store, self.examples, self.schedule, self.table = store, examples, schedule, table
        self.n_classes = table.n_classes
        self.done: set[int] = set()
        self.usage: dict[str, Usage] = {}
        self.unasked = 0
        self.calibrator = read_calibrator(store, config)
        self._waiting: dict[int, TicketLabels] = {}
        self._n_to_fit_on = 0
        """Waiting tickets that the calibrator is fitted on."""

    def take(self, ticket: int, labels: TicketLabels) -> int:
        """Store the labels of a ticket, whose file exists, now or once the calibrator is fitted.

        A second call changes nothing. Returns how many rows are new in the table.
        """
        if ticket in self.done or ticket in self._waiting:
            return 0
        self.usage = add_usages(self.usage, labels.usage)
        self.unasked += labels.unasked
        if self.calibrator is not None:
            return self._note(ticket, labels)
        self._waiting[ticket] = labels
        fitted_on = self._fitted_on()
        self._n_to_fit_on += ticket in fitted_on
        if self._n_to_fit_on < len(fitted_on):
            return 0
        self.calibrator = self._fit()
        self.store.write_json(CALIBRATION, self.calibrator.as_dict())
        waiting, self._waiting = self._waiting, {}
        return sum(self._note(*one) for one in sorted(waiting.items()))

    def restore(self, tickets: Iterable[int], usage: Mapping[str, Usage], unasked: int) -> None:
        """Mark tickets as done that are already in the table, with their usage."""
        self.done.update(tickets)
        self.usage = add_usages(self.usage, usage)
        self.unasked += unasked

    def _note(self, ticket: int, labels: TicketLabels) -> int:
        assert self.calibrator is not None
        p_MC = self.calibrator.apply(labels.probs_MC)
        self.done.add(ticket)
        put = self.table.relabel if ticket in self.schedule.review_tickets else self.table.put_labels
        return put(labels.row_M, p_MC.argmax(axis=1), confidence(p_MC), labels.member_M)

    def _fitted_on(self) -> range:
        """The tickets that the calibrator is fitted on: read before any selection."""
        if self.config.method == "temperature":
            return self.schedule.holdout_tickets
        return range(self.schedule.tickets_before(0))

    def _fit(self) -> Calibrator:
        tickets = [self._waiting[ticket] for ticket in self._fitted_on()]
        row_M = np.concatenate([np.empty(0, dtype=np.int64), *(one.row_M for one in tickets)])
        mass_MC = np.concatenate([np.empty((0, self.n_classes)), *(one.probs_MC for one in tickets)])
        gold_M = self.examples.read(row_M, ["gold"])["gold"].to_numpy()
        try:
            return Calibrator.fit(self.config, mass_MC, gold_M)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def draw_holdout(config: Config, examples: Examples, schedule: Schedule) -> np.ndarray:
    """int64[holdout], ascending: pool rows that the teacher labels and the student never trains on.

    Drawn at random by the run's seed; where a temperature is fitted on them, first from the texts with gold
    labels. Raises :class:`ConfigError` where there are too few of those.
    """
    rng, n = np.random.default_rng([config.run.seed, _HOLDOUT_SEED]), schedule.holdout
    if config.teacher.confidence.method != "temperature":
        return np.sort(rng.choice(examples.n_pool, n, replace=False))
    gold_N = examples.read(np.arange(examples.n_pool), ["gold"])["gold"].to_numpy()
    known, others = np.flatnonzero(gold_N >= 0), np.flatnonzero(gold_N < 0)
    n_known = min(n, known.size)
    if n_known < MIN_GOLD:
        raise ConfigError(
            f"teacher.confidence.method 'temperature': {n_known} texts of the hold-out have known gold (the "
            f"pool has {known.size}, evaluation.holdout comes to {n}); give {MIN_GOLD} at least, or take "
            "'batch' or 'raw'"
        )
    drawn = [rng.choice(known, n_known, replace=False), rng.choice(others, n - n_known, replace=False)]
    return np.sort(np.concatenate(drawn))


class TeacherWatch:
    """Tickets in progress at the teachers, tickets returned unfinished, and the actors that gave up."""

    def __init__(self, config: Config) -> None:
        self.members = dict(config.teacher.members())
        self.returned: deque[int] = deque()
        """Tickets waiting for another actor."""
        self._replacements: dict[int, int] = {}
        """By spare ticket, so that a repeated call gets the same one."""
        self._under_way: set[int] = set()
        self._calls: set[str] = set()
        """Ids of the calls that returned tickets, to recognise a repeated call."""
        self._lost: dict[str, dict[str, str]] = {name: {} for name in self.members}
        self._last_progress = time.monotonic()

    def leased(self, ticket: int) -> None:
        self._note_progress()
        self._under_way.add(ticket)

    def finished(self, ticket: int) -> None:
        self._note_progress()
        self._under_way.discard(ticket)

    def lost(self, ticket: int, teacher: str, actor: str, reason: str, call: str) -> None:
        """An actor that has given up returns its ticket; a repeat of the same ``call`` changes nothing.

        Another call of the same actor with the same ticket counts: the actor works on several tickets at a
        time, and one of its slots may have received the ticket that another returned.
        """
        self._note_progress()
        self._lost[teacher][actor] = reason
        if ticket in self._under_way and call not in self._calls:
            self._under_way.discard(ticket)
            if ticket not in self.returned:  # a restarted selector replays all calls
                self.returned.append(ticket)
        self._calls.add(call)

    def can_replace(self, spare: int) -> bool:
        """Whether there is a returned ticket for this spare one."""
        return spare in self._replacements or bool(self.returned)

    def replacement(self, spare: int) -> int:
        """The returned ticket that takes the place of a spare one; the same for every call."""
        if spare not in self._replacements:
            self._replacements[spare] = self.returned.popleft()
        return self._replacements[spare]

    def all_lost(self) -> bool:
        """Whether all actors of some teacher have given up, so that its tickets can never be done.

        A pool that may grow replaces an actor that gave up, up to its largest number of actors.
        """
        return any(len(self._lost[name]) >= one.max_actors for name, one in self.members.items())

    def failure_reason(self) -> str | None:
        """Why labelling cannot continue, in a sentence for the user, or None."""
        for name, teacher in self.members.items():
            lost = self._lost[name]
            if len(lost) >= teacher.max_actors:
                who = "the teacher" if name == "teacher" else f"the {name} teacher"
                return f"{who} has given up, all {teacher.max_actors} actor(s): {_reasons(lost)}"
        quiet = time.monotonic() - self._last_progress
        patience = max(teacher.no_progress_timeout_s for teacher in self.members.values())
        waiting = len(self._under_way) + len(self.returned)
        if waiting and quiet > patience:
            return (
                f"the teachers have made no progress for {quiet:.0f} s with {waiting} ticket(s) "
                "under way (teacher.no_progress_timeout_s): an actor waits for resources, or its node is lost"
                + "".join(f"; {len(lost)} gave up: {_reasons(lost)}" for lost in self._lost.values() if lost)
            )
        return None

    def _note_progress(self) -> None:
        self._last_progress = time.monotonic()


def _reasons(lost: dict[str, str]) -> str:
    """Why actors gave up, each reason once."""
    return "; ".join(dict.fromkeys(lost.values()))
