"""A selector without an actor, with students and teachers that answer from a table."""

from __future__ import annotations

import uuid

import numpy as np
from toys import make_config, make_run, put_label_file, toy_probs, toy_texts

from llkd_ray.metrics.uncertainty import StudentScores
from llkd_ray.selection.selector import Selector
from llkd_ray.storage.run_dir import BATCH, round_file
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.labels import TicketLabels

N_POOL, N_TEST, N_CLASSES = 200, 30, 3


GOLD = toy_texts(N_POOL + N_TEST, N_CLASSES, seed=0)[1]


TOKENS = 7
"""Prompt tokens of every text."""


class Bench:
    """A run directory, a selector on it, and the parts of teacher and student that talk to it."""

    def __init__(self, folder, **sections):
        settings = {
            "budget": {"rounds": 4, "train": 60, "growth": 1.0} | sections.pop("budget", {}),
            "teacher": {"ticket_size": 16} | sections.pop("teacher", {}),
        }
        self.config = make_config(**settings, **sections)
        self.store = make_run(folder, N_POOL, N_TEST, N_CLASSES)
        self.restart()

    def restart(self, session: str | None = None) -> Selector:
        """A new selector, as after a crash; of another driver unless a session is named.

        One of the same session finds the snapshot of the one before it.
        """
        self.selector = Selector(self.config, self.store.root, session or uuid.uuid4().hex)
        return self.selector

    @property
    def schedule(self):
        return self.selector.schedule

    def probs(self, row_M):
        # By row, so that the answer to a text does not depend on when it is asked.
        rows = [toy_probs(GOLD[[row]], N_CLASSES, 0.9, np.random.default_rng(row)) for row in row_M]
        return np.concatenate(rows) if rows else np.empty((0, N_CLASSES), dtype=np.float32)

    async def lease(self, ticket):
        """The rows of a ticket that is no spare one."""
        same, rows = await self.selector.lease(ticket)
        assert same == ticket
        return rows

    def write_labels(self, ticket, row_M):
        return put_label_file(self.store, ticket, row_M, self.probs(row_M), TOKENS)

    async def put(self, ticket, row_M, probs_MC, tokens, attempt=None):
        return await self.selector.put_labels(ticket, said(row_M, probs_MC, tokens, attempt))

    async def teach(self, ticket):
        row_M = await self.lease(ticket)
        self.write_labels(ticket, row_M)
        await self.put(ticket, row_M, self.probs(row_M), TOKENS * len(row_M))
        return row_M

    async def teach_for(self, k):
        """All tickets that round ``k`` waits for, as far as they are not labelled."""
        for ticket in range(self.schedule.tickets_before(k)):
            if ticket not in self.selector.ingest.done:
                await self.teach(ticket)

    def opinion(self, k):
        """float32[R, C]: what the student says of every row before round ``k``."""
        rng = np.random.default_rng(1000 * k)
        return rng.dirichlet(np.ones(N_CLASSES), N_POOL + N_TEST).astype(np.float32)

    async def tell(self, k, row_M, label_M):
        """A rank's scores of some rows."""
        await self.selector.refresh(k, row_M, StudentScores.of(self.opinion(k)[row_M], label_M))

    async def rows_to_score(self, k):
        return (await self.selector.rows_to_score(k))[0]

    async def score(self, k):
        rows, labels = await self.selector.rows_to_score(k)
        for mine in np.array_split(np.arange(rows.size), 2):  # two ranks
            await self.tell(k, rows[mine], labels[mine])
        await self.selector.refresh_done(k, rows.size)
        return rows

    async def round(self, k):
        await self.teach_for(k)
        await self.score(k)
        facts = await self.selector.select(k)
        await self.selector.trained(k, {"ranks": 1, "loss": 1.0 / (k + 1)})
        return facts

    async def rounds(self, stop=4, start=0):
        """Rounds one after another, each with its snapshot."""
        for k in range(start, stop):
            await self.round(k)
            if self.selector.snapshot_task:
                await self.selector.snapshot_task

    def batch(self, k):
        return self.store.read_table(round_file(k, BATCH))

    def batch_rows(self, rounds=4):
        return [self.batch(k)["row"].to_pylist() for k in range(rounds)]


def said(row_M, probs_MC, tokens, attempt=None) -> TicketLabels:
    """What the one teacher of a run says to some rows."""
    usage = {"teacher": Usage(texts=len(row_M), requests=len(row_M), prompt_tokens=tokens)}
    return TicketLabels(row_M, probs_MC, np.zeros(len(row_M), dtype=np.int8), usage, 0, attempt)
