"""The selector: one named actor that decides what the teacher reads and what the student learns.

It holds the score table and waits on it: teachers ask for leases and bring labels, student ranks ask for
rows to score and for batches, the driver asks for the next selection. Every call may come twice and then
gives the same answer. What must survive is in files before anybody is told of it, so a new selector
rebuilds itself from the run directory.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from llkd_ray import schemas
from llkd_ray.acquisition import ACQUISITION
from llkd_ray.config import Config
from llkd_ray.policies import SELECTION, Selection
from llkd_ray.priors import target_prior
from llkd_ray.schedule import Schedule
from llkd_ray.signals import Floats, Ints, confidence, normalise
from llkd_ray.store import (
    BATCH,
    LABELS_DIR,
    LEASES_DIR,
    ROUNDS_DIR,
    SCORES,
    SELECTED,
    TRAINED,
    Examples,
    RunStore,
    list_column,
    matrix_of,
    read_labels,
    round_file,
    ticket_of,
)
from llkd_ray.table import HOLDOUT, Candidates, ScoreTable

# First words of the seeds of the generators that are drawn from, so that no two share a stream.
_HOLDOUT_SEED, _ACQUIRE_SEED, _SELECT_SEED = 1, 2, 3


@dataclass
class Progress:
    """Where the run stands, for whoever wants to show it."""

    tickets_done: set[int] = field(default_factory=set)
    teacher_tokens: int = 0
    refreshed: set[int] = field(default_factory=set)
    selected: dict[int, dict[str, Any]] = field(default_factory=dict)
    trained: dict[int, dict[str, Any]] = field(default_factory=dict)
    finished: bool = False
    note: str = ""


class Selector:
    """The actor's class; also runs without Ray, in a test's event loop."""

    def __init__(self, config: Config, store_uri: str) -> None:
        self.config = config
        self.store = RunStore(store_uri)
        self.examples = Examples.open(self.store)
        self.schedule = Schedule.plan(config, self.examples.n_pool, self.examples.n_test)
        self.n_classes = len(config.labels.names)
        self.table = ScoreTable(self.n_classes, self.examples.n_pool, self.examples.n_test)
        self.policy = SELECTION[config.selection.policy]
        self.acquisition = ACQUISITION[config.acquisition.policy]
        self.leases: dict[int, Ints] = {}
        self.state = Progress()
        self.changed = asyncio.Condition()
        self._rebuild()

    # --- what the teacher asks -----------------------------------------------------------------------

    async def lease(self, ticket: int) -> Ints:
        """int64[M]: the rows that a ticket stands for; none where the run needs no more labels.

        Pool tickets wait until the round that is being taught is at most one ahead of the round that is
        being trained, so that the newest student's opinion can decide what is read. Where it does decide,
        they wait until that round is selected, so that the opinion is complete.
        """
        if ticket in self.schedule.pool_tickets:
            ahead = self.schedule.round_of(ticket)
            lead = 0 if self.acquisition.uses_student else 1
            await self._until(lambda: self.state.finished or ahead <= len(self.state.selected) + lead)
            if ticket not in self.leases:
                if self.state.finished:
                    return np.empty(0, dtype=np.int64)
                # In order, so that what a round reads does not depend on which ticket asks first.
                for k in range(ahead + 1):
                    self._plan_leases(k)
        return self.leases[ticket]

    async def put_labels(self, ticket: int, row_M: Ints, probs_MC: Floats, tokens: int) -> int:
        """Note the labels of a ticket, whose file is in place; returns how many are new."""
        new = self._note_labels(ticket, row_M, probs_MC, tokens)
        await self._notify()
        return new

    # --- what the student asks -----------------------------------------------------------------------

    async def next_round(self) -> int:
        """The first round that no student has finished."""
        return len(self.state.trained)

    async def last_trained(self) -> dict[str, Any] | None:
        """What was reported of the last finished round."""
        return self.state.trained[max(self.state.trained)] if self.state.trained else None

    async def holdout_rows(self) -> Ints:
        """int64[M]: the rows on which the student is held against the teacher."""
        return np.flatnonzero(self.table.flags & HOLDOUT)

    async def rows_to_score(self, round_number: int) -> Ints:
        """int64[M]: what the student scores before the round's selection; waits for the labels.

        Nothing where the policy does not ask for it, before the first round, or where the round is
        selected already.
        """
        await self.wait_labels(round_number)
        done = self.state.finished or round_number in self.state.selected
        if round_number == 0 or done or not self._student_is_asked():
            return np.empty(0, dtype=np.int64)
        if self.config.selection.refresh == "pool" or self.acquisition.uses_student:
            return self.table.untrained()
        return self._candidates(round_number).row_N

    async def refresh(self, round_number: int, row_M: Ints, p_MC: Floats) -> None:
        """Note the student's answers on some rows before a round."""
        self.table.refresh(round_number, row_M, p_MC)

    async def refresh_done(self, round_number: int) -> None:
        """All ranks have brought what they scored for the round."""
        columns = [pa.array(column) for column in self.table.scores(round_number)]
        self.store.write_table(
            round_file(round_number, SCORES), pa.Table.from_arrays(columns, schema=schemas.SCORES)
        )
        self.state.refreshed.add(round_number)
        await self._notify()

    async def batch_files(self, round_number: int) -> list[str] | None:
        """The batch files of all rounds up to this one, once it is selected; None when the run is over."""
        await self._until(lambda: self.state.finished or round_number in self.state.selected)
        if round_number not in self.state.selected:
            return None
        return [round_file(k, BATCH) for k in range(round_number + 1)]

    async def target_prior(self, round_number: int) -> Floats | None:
        """float[C]: the shares of the classes that the student of a selected round is to reckon with."""
        prior = self.state.selected[round_number].get("prior")  # none in a run begun by an older version
        return None if prior is None else np.array(prior)

    async def trained(self, round_number: int, facts: dict[str, Any]) -> None:
        """The student has finished a round and its files are in place."""
        self.store.write_json(round_file(round_number, TRAINED), facts)
        self.state.trained[round_number] = facts
        await self._notify()

    async def say(self, note: str) -> None:
        """A word on what the student is doing, for the progress display."""
        self.state.note = note

    # --- what the driver asks ------------------------------------------------------------------------

    async def wait_labels(self, round_number: int) -> None:
        """Return when every ticket that the round may choose from is labelled."""
        needed = set(range(self.schedule.tickets_before(round_number)))
        await self._until(lambda: self.state.finished or needed <= self.state.tickets_done)

    async def wait_refreshed(self, round_number: int) -> None:
        """Return when the student has scored what the round chooses from, if the policy asks for it."""
        if round_number > 0 and self._student_is_asked():
            done = self.state.selected, self.state.refreshed
            await self._until(lambda: any(round_number in rounds for rounds in done))

    async def select(self, round_number: int) -> dict[str, Any]:
        """Choose the round's texts and put its batch in place; the second call changes nothing."""
        if round_number not in self.state.selected:
            began = time.monotonic()
            candidates = self._candidates(round_number)
            n = self.schedule.train_target(round_number) - self.table.count_trained()
            rng = np.random.default_rng([self.config.run.seed, _SELECT_SEED, round_number])
            chosen = self.policy.choose(
                candidates,
                n,
                rng,
                quota=self.config.selection.quota,
                trained_C=self.table.trained_of_class(),
                options=self.config.selection.options,
            )
            prior_C = target_prior(
                self.table.labelled_of_class(self.schedule.tickets_before(round_number)),
                self.config.selection.prior,
                self.policy.prior,
                self.config.labels.known_prior,
            )
            self._write_batch(round_number, chosen)
            facts = {
                "selected": len(chosen),
                "candidates": len(candidates),
                "prior": None if prior_C is None else prior_C.tolist(),
                "seconds": time.monotonic() - began,
            }
            # The batch exists once this file does.
            self.store.write_json(round_file(round_number, SELECTED), facts)
            self.table.mark_trained(round_number, chosen.row_M)
            self.state.selected[round_number] = facts
            await self._notify()
        return self.state.selected[round_number]

    async def wait_trained(self, round_number: int) -> dict[str, Any]:
        """What the student reported of the round, once it has finished it."""
        await self._until(lambda: round_number in self.state.trained)
        return self.state.trained[round_number]

    async def finish(self) -> None:
        """No round comes after this: open leases come back empty and the ranks go home."""
        self.state.finished = True
        await self._notify()

    async def stats(self) -> dict[str, Any]:
        """Counts for progress and metrics."""
        return {
            "labelled": self.table.count_labelled(),
            "trained": self.table.count_trained(),
            "teacher_tokens": self.state.teacher_tokens,
            "tickets_done": len(self.state.tickets_done),
            "rounds_trained": len(self.state.trained),
            "note": self.state.note,
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

    def _candidates(self, round_number: int) -> Candidates:
        return self.table.candidates(self.schedule.tickets_before(round_number))

    def _note_labels(self, ticket: int, row_M: Ints, probs_MC: Floats, tokens: int) -> int:
        p_MC = normalise(probs_MC)
        new = self.table.put_labels(row_M, p_MC.argmax(axis=1), confidence(p_MC))
        if ticket not in self.state.tickets_done:
            self.state.tickets_done.add(ticket)
            self.state.teacher_tokens += tokens
        return new

    def _plan_leases(self, round_number: int) -> None:
        """Choose the rows of all tickets that a round is the first to choose from, if that is not done."""
        below = self.schedule.tickets_before(round_number)
        start = self.schedule.tickets_before(round_number - 1) if round_number else 0
        tickets = range(max(start, self.schedule.pool_tickets.start), below)
        if not tickets or tickets[0] in self.leases:
            return
        sizes = [self.schedule.ticket_rows(ticket) for ticket in tickets]
        rng = np.random.default_rng([self.config.run.seed, _ACQUIRE_SEED, round_number])
        row_M = self.acquisition.choose(
            self.table.unread(),
            sum(sizes),
            rng,
            seed=self.config.run.seed,
            explore=self.config.acquisition.explore,
        )
        ticket_M = np.repeat(np.array(tickets, dtype=np.int32), sizes)
        # In place before anybody acts on it: a selector that comes after this one leases the same.
        self.store.write_table(
            f"{LEASES_DIR}/{round_number:04d}.parquet",
            pa.Table.from_arrays([pa.array(ticket_M), pa.array(row_M)], schema=schemas.LEASES),
        )
        self._note_leases(ticket_M, row_M)

    def _note_leases(self, ticket_M: Ints, row_M: Ints) -> None:
        """Rows by ticket; ``ticket_M`` is ascending."""
        tickets, starts = np.unique(ticket_M, return_index=True)
        for ticket, rows in zip(tickets.tolist(), np.split(row_M, starts[1:]), strict=bool(tickets.size)):
            self.leases[ticket] = rows
            self.table.lease(ticket, rows)

    def _write_batch(self, round_number: int, chosen: Selection) -> None:
        row_M = np.asarray(chosen.row_M, dtype=np.int64)
        texts = self.examples.read(row_M, ["text"])["text"]
        labels = read_labels(self.store, np.unique(self.table.ticket[row_M]).tolist())
        by_row = np.argsort(labels["row"].to_numpy(), kind="stable")
        place_M = by_row[np.searchsorted(labels["row"].to_numpy(), row_M, sorter=by_row)]
        p_MC = normalise(matrix_of(labels["probs"].take(pa.array(place_M)), self.n_classes))
        columns = [
            pa.array(row_M),
            texts,
            pa.array(self.table.label[row_M]),
            list_column(p_MC),
            pa.array(np.asarray(self._weights(chosen), dtype=np.float32)),
        ]
        self.store.write_table(
            round_file(round_number, BATCH), pa.Table.from_arrays(columns, schema=schemas.ROUND)
        )

    def _weights(self, chosen: Selection) -> Floats:
        if self.config.selection.weighting == "none":
            return np.ones(len(chosen))
        return chosen.weight_M

    def _rebuild(self) -> None:
        """Bring the table to what the files say."""
        self._note_fixed_leases()
        for name in self.store.names(LEASES_DIR, ".parquet"):
            leases = self.store.read_table(f"{LEASES_DIR}/{name}")
            self._note_leases(leases["ticket"].to_numpy(), leases["row"].to_numpy())
        for name in self.store.names(LABELS_DIR, ".parquet"):
            labels = self.store.read_table(f"{LABELS_DIR}/{name}", ["row", "probs", "prompt_tokens"])
            self._note_labels(
                ticket_of(name),
                labels["row"].to_numpy(),
                matrix_of(labels["probs"], self.n_classes),
                int(labels["prompt_tokens"].to_numpy().sum()),
            )
        for k in range(len(self.store.folders(ROUNDS_DIR))):
            self._rebuild_round(k)
        self.state.finished = len(self.state.trained) == self.schedule.rounds

    def _rebuild_round(self, k: int) -> None:
        if self.store.exists(round_file(k, SCORES)):
            scores = self.store.read_table(round_file(k, SCORES))
            self.table.restore_scores(k, *(column.to_numpy() for column in scores.columns))
            self.state.refreshed.add(k)
        if self.store.exists(round_file(k, SELECTED)):
            batch = self.store.read_table(round_file(k, BATCH), ["row"])
            self.table.mark_trained(k, batch["row"].to_numpy())
            self.state.selected[k] = self.store.read_json(round_file(k, SELECTED))
        if self.store.exists(round_file(k, TRAINED)):
            self.state.trained[k] = self.store.read_json(round_file(k, TRAINED))

    def _note_fixed_leases(self) -> None:
        """Hold-out and test rows do not depend on anything that happens in the run."""
        rng = np.random.default_rng([self.config.run.seed, _HOLDOUT_SEED])
        holdout = np.sort(rng.choice(self.examples.n_pool, self.schedule.holdout, replace=False))
        self.table.hold_out(holdout)
        for tickets, rows in (
            (self.schedule.holdout_tickets, holdout),
            (self.schedule.test_tickets, self.examples.test_rows[: self.schedule.test]),
        ):
            sizes = [self.schedule.ticket_rows(ticket) for ticket in tickets]
            self._note_leases(np.repeat(np.array(tickets, dtype=np.int32), sizes), rows)


def start_selector(config: Config, store_uri: str) -> Any:
    """The actor's handle. It restarts, and its callers' calls with it, wherever its node may go.

    The name is the run's own, so a second driver on the same run and cluster is refused by Ray.
    """
    run = hashlib.blake2b(store_uri.encode(), digest_size=6).hexdigest()
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    remote = ray.remote(Selector).options(name=f"llkd-selector-{run}", **options)
    return remote.remote(config, store_uri)
