"""The selector: one named actor that decides what the teacher reads and what the student learns.

It holds the score table: teachers lease tickets and return labels, student ranks request rows to score and
batches, the driver requests the next selection. Every call is idempotent. State that must survive is written
to files before it is returned, so a new selector rebuilds itself from the run directory.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llkd_ray.config.schedule import Schedule
from llkd_ray.config.schema import Config
from llkd_ray.metrics.uncertainty import Floats, Ints, StudentScores
from llkd_ray.selection.acquisition import find_acquisition
from llkd_ray.selection.policies import find_selection, target_prior
from llkd_ray.selection.recovery import Progress, Snapshot, apply_human_labels, load_snapshot, save_snapshot
from llkd_ray.selection.rounds import RoundSelection, batch_of, sample_candidates
from llkd_ray.selection.table import ScoreTable
from llkd_ray.selection.tickets import LabelIngest, Leases, TeacherWatch
from llkd_ray.storage.lock import Fence
from llkd_ray.storage.run_dir import (
    BATCH,
    CANDIDATE_SAMPLE,
    LABELS_DIR,
    LOST_DIR,
    SMALL_DIR,
    RunStore,
    round_file,
)
from llkd_ray.storage.tables import AuditAnswers, Examples
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.budget import Ledger
from llkd_ray.teacher.labels import TicketLabels, read_all, read_lost_usage

MAX_CONCURRENT_CALLS = 100_000
"""Waiting calls count too, two or more per teacher: with Ray's default of 1,000, they would block the calls
that deliver the labels they wait for.
"""
_NO_ROWS: Ints = np.empty(0, dtype=np.int64)


class ScoresLost(RuntimeError):
    """Some of a round's scores went to a selector that has died."""


class Selector:
    """The actor's class; also runs without Ray, in a test's event loop."""

    def __init__(self, config: Config, store_uri: str, session: str = "") -> None:
        """``session`` is the driver's: actors lost in an earlier session do not count."""
        self.config, self.session = config, session
        self.store = RunStore(store_uri)
        # Before any file is read, so that an older selector cannot write after that.
        self.fence = Fence.claim(self.store, session)
        self.examples = Examples.open(self.store)
        self.schedule = Schedule.plan(config, self.examples.n_pool, self.examples.n_test)
        self.n_classes = len(config.labels.names)
        self.table = ScoreTable(self.n_classes, self.examples.n_pool, self.examples.n_test)
        self.policy = find_selection(config.selection)
        self.acquisition = find_acquisition(config.acquisition)
        self.broken_files: list[str] = []
        """A line about each unreadable label file."""
        self.damaged: set[int] = set()
        """Tickets of these files that were done."""
        # Before the leases, which may be newer than the snapshot.
        snapshot = load_snapshot(self.store, session)
        if snapshot:
            self.table.restore(snapshot.columns)
        self.snapshot_task: asyncio.Task[None] | None = None
        """Writes the last snapshot."""
        self.ingest = LabelIngest(config, self.store, self.examples, self.schedule, self.table)
        self.teachers = TeacherWatch(config)
        self.ledger = Ledger(config.budget.cap, {name: one.price for name, one in config.teacher.members()})
        self.leases = Leases(config, self.acquisition, self.store, self.examples, self.schedule, self.table)
        self.state = Progress(self.store, self.table)
        self.audited = AuditAnswers.read(self.store)
        """Human labels, as of now."""
        self._to_score: dict[int, Ints] = {}
        self._scored: Counter[int] = Counter()
        """By round: scores received by this instance."""
        self.changed = asyncio.Condition()
        self._rebuild(snapshot)

    # --- called by teachers -----------------------------------------------------------------------

    async def lease(self, ticket: int) -> tuple[int, Ints]:
        """The ticket, and int64[M]: its rows; none where the run needs no more labels.

        Pool tickets wait until their round is at most one ahead of the round in training, so that acquisition
        can use the newest scores. Where it does use them, they wait until that round is selected, so that the
        scores are complete. A negative number is a spare ticket: it is replaced by a ticket that a teacher
        has returned, once there is one.
        """
        if ticket < 0:
            spare = ticket
            await self._until(lambda: self._teaching_is_over() or self.teachers.can_replace(spare))
            if not self.teachers.can_replace(spare):
                return spare, _NO_ROWS
            ticket = self.teachers.replacement(spare)
        self.fence.check_throttled()
        rows = await self._rows_of(ticket)
        if rows.size:
            self.teachers.leased(ticket)
        else:
            await self._notify_done(ticket)
        return ticket, rows

    async def reserve(self, ticket: int, attempt: str, teacher: str, usage: dict[str, Any]) -> bool:
        """Whether a ticket may use this much more of a teacher; waits while others may release some."""
        if not self.ledger.open:
            self.fence.check_throttled()  # a newer selector does not know what this one grants
        claim = self._account(ticket, teacher), attempt, teacher, Usage(**usage)
        async with self.changed:
            while (verdict := self.ledger.reserve(*claim)) == "wait":
                await self.changed.wait()
            self.changed.notify_all()  # a denial may unblock others
        return verdict == "granted"

    async def put_labels(self, ticket: int, labels: TicketLabels) -> int:
        """Store the labels of a ticket, whose file exists; returns how many are new."""
        self.teachers.finished(ticket)
        self._commit_usage(ticket, labels.usage, labels.attempt)
        new = self.ingest.take(ticket, labels)
        await self._notify()
        return new

    async def commit_usage(
        self, ticket: int, teacher: str, usage: dict[str, Any], attempt: str | None
    ) -> None:
        """The small teacher of a cascade has finished a ticket: book its usage."""
        self._commit_usage(ticket, {teacher: Usage(**usage)}, attempt)
        await self._notify()

    async def give_back(self, ticket: int, teacher: str, actor: str, reason: str, call: str) -> None:
        """A teacher's actor has given up; another takes its ticket. ``call`` is unique to the call."""
        said = dict[str, Any](ticket=ticket, teacher=teacher, actor=actor, reason=reason, call=call)
        with suppress(OSError):  # the disk may be full; only a restart needs the file
            self.store.write_json(f"{LOST_DIR}/{actor}-{call}.json", said | {"session": self.session})
        self.teachers.lost(**said)
        self.ledger.abandon(self._account(ticket, teacher))
        await self._notify()

    async def wait_taught(self) -> None:
        """Return when the teachers have no work left."""
        await self._until(self._teaching_is_over)

    # --- called by the student -----------------------------------------------------------------------

    async def wait_first_labels(self) -> None:
        """Return when the first ticket is done, in this run or before it was stopped."""
        await self._until(lambda: self.state.finished or bool(self.ingest.done))

    async def next_round(self) -> int:
        """The first round that is not trained."""
        return len(self.state.trained)

    async def last_trained(self) -> dict[str, Any] | None:
        """The student's record of the last finished round."""
        return self.state.trained[max(self.state.trained)] if self.state.trained else None

    async def holdout_rows(self) -> Ints:
        """int64[M]: the rows on which student and teacher are compared."""
        return self.table.held_out()

    async def rows_to_score(self, round_number: int) -> tuple[Ints, Ints]:
        """int64[M], int16[M]: rows that the student scores before the round's selection, and their labels.

        Waits for the labels; a label is negative where the row has none.
        Empty where no policy uses the student, before the first round, or once the round is selected.
        """
        await self.wait_labels(round_number)
        done = self.state.finished or round_number in self.state.selected
        if round_number == 0 or done or not self._student_is_asked():
            return _NO_ROWS, self.table.label[_NO_ROWS]
        if round_number not in self._to_score:
            # Once, because incoming scores change the answer.
            self._to_score = {round_number: self._selection(round_number).to_score()}
        row_M = self._to_score[round_number]
        if not row_M.size:  # no rank will call refresh_done
            self.state.refreshed.add(round_number)
            await self._notify()
        return row_M, self.table.label[row_M]

    async def refresh(self, round_number: int, row_M: Ints, scores: StudentScores) -> None:
        """Store the student's scores of some rows before a round."""
        self.table.refresh(round_number, row_M, scores)
        self._scored[round_number] += row_M.size

    async def refresh_done(self, round_number: int, n_rows: int) -> None:
        """All ranks have sent their scores for the round, ``n_rows`` in all.

        Raises ScoresLost where an earlier selector received some of them: they are in no file before this
        call, so the ranks score again, as after any other failure.
        """
        self.fence.check()
        lost = n_rows - self._scored[round_number]
        if lost > 0 and round_number not in self.state.refreshed:
            raise ScoresLost(f"round {round_number}: {lost} of {n_rows} scores went to a selector that died")
        self.audited.keep_for(self.store, round_number)  # the scores are about these labels
        self.state.note_refreshed(round_number)
        await self._notify()

    async def batch_files(self, round_number: int) -> list[str] | None:
        """The batch files of all rounds up to this one, once it is selected; None when the run is over."""
        await self._until(lambda: self.state.finished or round_number in self.state.selected)
        if round_number not in self.state.selected:
            return None
        return [round_file(k, BATCH) for k in range(round_number + 1)]

    async def target_prior(self, round_number: int) -> Floats | None:
        """float[C]: the class prior of a selected round; see :func:`policies.target_prior`."""
        prior = self.state.selected[round_number]["prior"]
        return None if prior is None else np.array(prior)

    async def student_failed(self, reason: str) -> None:
        """A rank cannot go on, and no other could: the run ends with this reason."""
        self.state.student_failure = reason

    async def assert_owner(self) -> None:
        """Raises Superseded where another driver, or a newer selector, has taken over the run."""
        self.fence.check()

    async def trained(self, round_number: int, record: dict[str, Any]) -> None:
        """The student has finished a round and its files are written."""
        self.fence.check()
        self.state.note_trained(round_number, record)
        await self._notify()
        is_idle = self.snapshot_task is None or self.snapshot_task.done()
        if is_idle and len(self.state.trained) < self.schedule.rounds:
            self.snapshot_task = asyncio.create_task(self._write_snapshot())

    async def say(self, note: str) -> None:
        """What the student is doing, for the progress display."""
        self.state.note = note

    # --- called by the driver ------------------------------------------------------------------------

    async def wait_labels(self, round_number: int) -> None:
        """Return when every ticket that the round may choose from is labelled."""
        needed = set(self.schedule.needed_for(round_number))
        await self._until(lambda: self.state.finished or needed <= self.ingest.done)

    async def wait_refreshed(self, round_number: int) -> None:
        """Return when the student has scored the round's candidates, if a policy uses it."""
        if round_number > 0 and self._student_is_asked():
            done = self.state.selected, self.state.refreshed
            await self._until(lambda: any(round_number in rounds for rounds in done))

    async def select(self, round_number: int) -> dict[str, Any]:
        """Choose the round's texts and write its batch; a second call changes nothing."""
        if round_number not in self.state.selected:
            began = time.monotonic()
            self.fence.check()
            selection = self._selection(round_number)
            n = self.schedule.train_target(round_number) - self.table.count_trained()
            chosen = selection.choose(n)
            before = self.schedule.tickets_before(round_number)
            labelled_C = self.table.labelled_of_class(before)
            prior_C = target_prior(
                labelled_C,
                self.config.selection.prior,
                self.policy.prior,
                self.config.labels.known_prior,
            )
            assert self.ingest.calibrator is not None
            reviews = self.schedule.review_tickets[:round_number]
            self.audited.keep_for(self.store, round_number)
            calibrator, audited = self.ingest.calibrator, self.audited
            batch = batch_of(chosen, self.store, self.examples, self.table, reviews, calibrator, audited)
            record = {
                "selected": len(chosen),
                "candidates": chosen.candidates,
                "staleness": selection.staleness(chosen.row_M),
                "prior": None if prior_C is None else prior_C.tolist(),
                "labelled_of_class": labelled_C.tolist(),
                "thresholds": chosen.thresholds and {k: v.tolist() for k, v in chosen.thresholds.items()},
                "seconds": time.monotonic() - began,
            }
            candidate_sample = sample_candidates(self.table, before, chosen.candidates, chosen.row_M)
            self.store.write_table(round_file(round_number, CANDIDATE_SAMPLE), candidate_sample)
            self.state.note_selected(round_number, batch, record)
            await self._notify()
        return self.state.selected[round_number]

    async def wait_trained(self, round_number: int) -> dict[str, Any]:
        """The student's record of the round, once it is finished."""
        await self._until(lambda: round_number in self.state.trained)
        return self.state.trained[round_number]

    async def finish(self) -> None:
        """No more rounds: waiting leases return no rows, and the ranks end."""
        self.state.finished = True
        await self._notify()

    async def stats(self) -> dict[str, Any]:
        """Counts for progress and metrics."""
        return {
            "labelled": self.table.count_labelled(),
            "trained": self.table.count_trained(),
            "teacher_tokens": sum(usage.tokens for usage in self.ingest.usage.values()),
            "usage": {name: usage.as_dict() for name, usage in self.ingest.usage.items()},
            "tickets_done": len(self.ingest.done),
            "unasked": self.ingest.unasked,
            "cap_reached": self.ledger.reached,
            "rounds_trained": len(self.state.trained),
            "note": self.state.note,
            "trouble": self.teachers.failure_reason(),
            "student_failure": self.state.student_failure,
            "broken_files": self.broken_files,
            "damaged": sorted(self.damaged),
        }

    # --- inside --------------------------------------------------------------------------------------

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(holds)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _student_is_asked(self) -> bool:
        return self.policy.uses_student or self.acquisition.uses_student

    def _selection(self, round_number: int) -> RoundSelection:
        before = self.schedule.tickets_before(round_number)
        return RoundSelection(self.config, self.policy, self.acquisition, self.table, round_number, before)

    def _teaching_is_over(self) -> bool:
        """Whether every ticket is done; after the last round, those of hold-out and test set are enough."""
        if self.teachers.all_lost() or len(self.ingest.done) == self.schedule.n_tickets:
            return True
        return self.state.finished and self.ingest.done.issuperset(self.schedule.fixed_tickets())

    def _account(self, ticket: int, teacher: str) -> int:
        """The ticket's number in the ledger, which has one for each teacher of a ticket."""
        members = list(self.teachers.members)
        return ticket * len(members) + members.index(teacher)

    def _commit_usage(self, ticket: int, usage: Mapping[str, Usage], attempt: str | None = None) -> None:
        for teacher, one in usage.items():
            self.ledger.commit(self._account(ticket, teacher), {teacher: one}, attempt)

    async def _rows_of(self, ticket: int) -> Ints:
        if not self.schedule.is_fixed(ticket):
            ahead = self.schedule.round_of(ticket)
            lead = 0 if ticket in self.schedule.review_tickets or self.acquisition.uses_student else 1
            await self._until(lambda: self.state.finished or ahead <= len(self.state.selected) + lead)
            if self.state.finished and ticket not in self.leases.rows:
                return _NO_ROWS
        if ticket not in self.leases.rows:
            self.fence.check()
        return self.leases.of(ticket)

    async def _notify_done(self, ticket: int) -> None:
        """Mark a ticket without rows as done."""
        if not self.state.finished:
            self.ingest.take(ticket, TicketLabels.empty(self.n_classes))
        await self._notify()

    async def _write_snapshot(self) -> None:
        """Other calls are processed meanwhile; after a restart, their updates are repeated from the files."""
        tickets = np.array(sorted(self.ingest.done), dtype=np.int64)
        rounds, usage, unasked = len(self.state.trained), dict(self.ingest.usage), self.ingest.unasked
        columns: dict[str, NDArray[Any]] = {}
        for _ in self.table.copy_into(columns):
            await asyncio.sleep(0)
        snapshot = Snapshot(columns, tickets, rounds, usage, unasked)
        # Without it, a restarted selector reads all label files.
        with suppress(OSError):
            await asyncio.to_thread(save_snapshot, self.store, self.session, snapshot)

    def _rebuild(self, snapshot: Snapshot | None) -> None:
        """Build the table from the files, except for what is in the snapshot."""
        if snapshot:
            tickets = snapshot.tickets.tolist()
            self.ingest.restore(tickets, snapshot.usage, snapshot.unasked)
            accounts = [self._account(t, name) for t in tickets for name in self.teachers.members]
            self.ledger.restore_committed(accounts, snapshot.usage)
        self.ledger.restore(read_lost_usage(self.store))
        known = frozenset(self.ingest.done)
        reviews: dict[int, TicketLabels] = {}
        for ticket, labels in read_all(self.store, LABELS_DIR, self.n_classes, self._note_damaged, known):
            self._commit_usage(ticket, labels.usage)
            if ticket in self.schedule.review_tickets:
                reviews[ticket] = labels  # in its round, because the student scored the new label later
            else:
                self.ingest.take(ticket, labels)
        for ticket, labels in read_all(self.store, SMALL_DIR, self.n_classes, self._note_unused, known):
            self._commit_usage(ticket, labels.usage)
        for ticket in self.leases.empty_reviews():
            self.ingest.take(ticket, TicketLabels.empty(self.n_classes))
        for name in self.store.names(LOST_DIR):
            record = self.store.read_json(f"{LOST_DIR}/{name}")
            if (
                record["session"] == self.session
                and record["ticket"] not in self.ingest.done | reviews.keys()
            ):
                self.teachers.leased(record["ticket"])
                self.teachers.lost(**{name: said for name, said in record.items() if name != "session"})
        for k in range(self.state.rounds_on_disk()):
            for ticket in self.schedule.review_tickets[k - 1 : k] if k else ():
                if ticket in reviews:
                    self.ingest.take(ticket, reviews.pop(ticket))
            # In their round, for the same reason.
            apply_human_labels(AuditAnswers.of_round(self.store, k), self.table)
            self.state.restore(k, in_table=snapshot is not None and k < snapshot.rounds)
        for ticket, labels in reviews.items():
            self.ingest.take(ticket, labels)
        apply_human_labels(self.audited, self.table)
        self.state.finished = len(self.state.trained) == self.schedule.rounds

    def _note_damaged(self, ticket: int, line: str) -> None:
        self.damaged.add(ticket)
        self.broken_files.append(line)

    def _note_unused(self, ticket: int, line: str) -> None:
        """Note a damaged file of a small teacher: its ticket is done without it."""
        self.broken_files.append(line)


def start_selector(config: Config, store_uri: str, session: str) -> Any:
    """Start the actor and return its handle. Ray restarts it, on another node if needed, and retries calls.

    It starts on the driver's node, which a run needs anyway, rather than on one that may be pre-empted.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(Selector)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=MAX_CONCURRENT_CALLS,
            scheduling_strategy=here,
        )
        .remote(config, store_uri, session)
    )
