"""A cascade: the small teacher reads all texts, the large one those that the small one is unsure of."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llkd_ray.metrics.uncertainty import confidence, normalise
from llkd_ray.storage import tables
from llkd_ray.storage.run_dir import LABELS_DIR, SMALL_DIR, ticket_file
from llkd_ray.storage.tables import matrix_of
from llkd_ray.teacher.base import Usage
from llkd_ray.teacher.labels import in_row_order, read_ticket, write_ticket
from llkd_ray.teacher.worker import Stage


class SmallStage(Stage):
    """A cascade's small teacher: labels all tickets except reviews, and passes every ticket on."""

    def empty(self, leased: pa.Table) -> pa.Table:
        return leased.slice(0, 0)

    async def process(self, ticket: int, leased: pa.Table) -> pa.Table:
        is_done = any(self.store.exists(ticket_file(folder, ticket)) for folder in (SMALL_DIR, LABELS_DIR))
        if not is_done and not self.is_review(ticket):
            answers = await self.worker.label(ticket, leased)
            usage, in_flight = {self.worker.name: answers.usage}, self.worker.teacher_config.tickets_in_flight
            await asyncio.to_thread(
                write_ticket, self.store, SMALL_DIR, ticket, answers.labels, usage, answers.unasked, in_flight
            )
            await self.worker.clear_mark(answers)
            await self.selector.commit_usage.remote(ticket, self.worker.name, answers.usage.as_dict())
        return leased


class LargeStage(Stage):
    """A cascade's large teacher: labels texts that the small one is unsure of or failed on, and reviews."""

    member = 1

    async def process(self, ticket: int, leased: pa.Table) -> pa.Table:
        done = await self.existing(ticket)
        if done is None:
            small, usage = await asyncio.to_thread(self._small_answers, ticket)
            doubtful = leased.filter(pa.array(~np.isin(leased["row"].to_numpy(), self._sure_rows(small))))
            answers = await self.worker.label(ticket, doubtful)
            answered_by_large = pc.is_in(small["row"], value_set=answers.labels["row"].combine_chunks())
            kept = small.filter(pc.invert(answered_by_large))
            labels = in_row_order([kept, answers.labels], leased["row"].to_numpy())
            if self.is_review(ticket):
                # A text whose review fails keeps its label, so it is not quarantined.
                answers = replace(answers, outcome_M=[""] * len(doubtful))
            done = await self.commit(
                ticket, doubtful, labels, usage | {self.worker.name: answers.usage}, answers
            )
        return await self.notify(ticket, done)

    def _small_answers(self, ticket: int) -> tuple[pa.Table, dict[str, Usage]]:
        if not self.store.exists(ticket_file(SMALL_DIR, ticket)):  # a review
            return tables.LABELS.empty_table(), {}
        labels, usage, _ = read_ticket(self.store, SMALL_DIR, ticket)
        return labels.replace_schema_metadata(None), usage

    def _sure_rows(self, small: pa.Table) -> np.ndarray:
        """int64: the rows whose small answer is accepted without the large teacher."""
        cascade = self.config.teacher.cascade
        assert cascade is not None
        p_MC = normalise(matrix_of(small["probs"], len(self.config.labels.names)))
        return small["row"].to_numpy()[confidence(p_MC) >= cascade.escalate_below]
